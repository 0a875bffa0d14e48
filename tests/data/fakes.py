"""A world of numbered records for the loader's tests: each clip is a handful of placeholder tokens."""

from __future__ import annotations

import json
import os
import signal
import time

import jax
import numpy as np

from mllm4d_jax.encode.encoder import media_identity
from mllm4d_jax.encode.example import Example, Grid, VideoOptions
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.rows.shape import RowShape

VIDEO, PATCH = 500, 24
SHAPE = RowShape(VisionGeometry(merge_size=2, position_side=4, window=0), (501, VIDEO), PATCH, (8, 16, 32), (8, 16))


def make_example(key: str, text: int, grid: Grid | None = None, supervised: slice = slice(2, 4)) -> Example:
    """`text` text tokens numbered from 100, after the placeholders of one visual item."""
    visual = grid.t * grid.h * grid.w // 4 if grid else 0
    tokens = np.concatenate([np.full(visual, VIDEO), 100 + np.arange(text)]).astype(np.int32)
    mask = np.zeros(len(tokens), bool)
    mask[visual:][supervised] = True
    return Example(
        key=key,
        tokens=tokens,
        positions=np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1)),
        rope_delta=0,
        supervised=mask,
        patches=np.full((4 * visual, PATCH), hash(key.split("#")[0]) % 7, np.float32),
        grids=(grid,) if grid else (),
        timestamps=(),
        text="",
    )


class FakeEncoder:
    """Encodes a record to as many tokens as its text says; negative numbers are bad records, bad.mp4 is a
    bad clip."""

    options = VideoOptions(decode_timeout_s=1.0)

    def __init__(self):
        self.calls, self.groups = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def encode_group(self, records, cache=None):
        self.groups.append([r.key for r in records])
        return [self._encode(record) for record in records]

    def _encode(self, record):
        self.calls.append(record.key)
        media = media_identity(record)
        number = int(record.messages[0]["content"][-1]["text"])
        if number < 0 or any(path.endswith("/bad.mp4") for _, path in media):
            return RecordError("made to fail", "missing_file", record.key)
        return make_example(record.key, number, Grid("video", 2, 2, 2) if media else None)


class DangerousEncoder(FakeEncoder):
    """What 13 to 16 tokens do to a worker process: it dies, hangs, meets a bug, dies the first time only."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _encode(self, record):
        number = int(record.messages[0]["content"][-1]["text"])
        marker = self.folder / "died"
        if number == 13 or number == 16 and not marker.exists():
            marker.touch()
            with (self.folder / "deaths").open("a") as deaths:
                deaths.write(f"{number} ")
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 14:
            time.sleep(600)
        if number == 15:
            raise ZeroDivisionError("a bug")
        return super()._encode(record)


def write_records(path, entries):
    """`entries`: numbers (no media), or (clip name, number)."""
    records = []
    for entry in entries:
        clip, number = entry if isinstance(entry, tuple) else (None, entry)
        mark = "<video>" if clip else ""
        record = {"conversations": [{"from": "user", "value": f"{mark}{number}"}]}
        records.append(record | ({"video": clip} if clip else {}))
    path.write_text(json.dumps(records))
    return path


def next_batch(loader):
    """The next step of a loader on one host, padded at once."""
    step = loader.next_step()
    return step.finish(loader.shape.sizes(step.needed))


def arrays(loaded):
    """The arrays of a LoadedBatch; the layout, which is static, is not one."""
    batch = loaded.batch
    return jax.tree.leaves(batch._replace(inputs=batch.inputs._replace(layout=None)))
