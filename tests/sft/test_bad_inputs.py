"""Every kind of bad record in one file, through the real loader: each is named with its reason, no other is lost."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.loader import Loader
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.data.stream import GroupStream, LoaderOptions
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.rows.shape import RowShape
from tests.data.fakes import next_batch


def write_clip(path, frames: int, height: int, width: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8.0, (width, height))
    rng = np.random.default_rng(0)
    for _ in range(frames):
        writer.write(cv2.resize(rng.integers(0, 255, (9, 16, 3)).astype(np.uint8), (width, height)))
    writer.release()


# name -> (frames, height, width) of clips that must work
GOOD = {
    "plain": (8, 64, 96),
    "odd": (5, 64, 64),
    "two_frames": (2, 64, 64),
    "tiny": (4, 16, 20),
    "portrait": (6, 160, 48),
    "wide": (4, 24, 320),
    "uhd": (4, 4320, 7680),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for name, shape in GOOD.items():
        write_clip(folder / f"{name}.mp4", *shape)
    write_clip(folder / "one_frame.mp4", 1, 64, 64)
    whole = (folder / "plain.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video " * 100)
    write_clip(folder / "sliver.mp4", 4, 16, 16 * 250)
    return folder


def record(video, text="<video>\nWhat moves?", role="human", answer="B") -> dict:
    return {"video": video, "conversations": [{"from": role, "value": text}, {"from": "gpt", "value": answer}]}


ASKED = {"from": "human", "value": "<video>\nWhat moves?"}
# reason -> the line that must be refused for it; a name makes the reason unique where two lines share one
BAD = {
    "missing_file": record("absent.mp4"),
    "truncated_video": record("truncated.mp4"),
    "empty_file": record("empty.mp4"),
    "not_a_video": record("text.mp4"),
    "one_frame": record("one_frame.mp4"),
    "bad_size": record("sliver.mp4"),
    "placeholder_mismatch": record("plain.mp4", "What moves?"),
    "placeholder_mismatch/2": record("plain.mp4", "<video><video>What moves?"),
    "unknown_role": record("plain.mp4", role="moderator"),
    "path_outside_root": record("../media.mp4"),
    "path_outside_root/2": record("/etc/passwd"),
    "too_long": record("plain.mp4", "<video>\n" + "very " * 2000),
    "no_target": {"video": "plain.mp4", "conversations": [{"from": "human", "value": "<video>What moves?"}]},
    "no_target/2": {"video": "plain.mp4", "conversations": [ASKED, {"from": "gpt", "value": "B", "loss": False}]},
    "empty_answer": record("plain.mp4", answer=" \n"),
    "bad_range": record("plain.mp4") | {"video_start": 1.5},
    "bad_path": record("\udc80.mp4"),
    "bad_record/2": record("plain.mp4") | {"video_start": 2, "video_end": 1},
    "bad_record/3": record("plain.mp4") | {"system": ["s"]},
    "bad_record/4": {f"key {n}": n for n in range(10_000)},
    "bad_json": '{"video": "plain.mp4", "conversations": [',
    "bad_record": "[1, 2]",
}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_bad_record_is_named_and_every_good_one_is_used_once(tiny_world, root, tmp_path, batch_size):
    """Alone, and in groups of up to four questions about a clip."""
    model, _ = tiny_world
    lines = [record(f"{name}.mp4") for name in GOOD] + list(BAD.values())
    order = np.random.default_rng(0).permutation(len(lines))
    path = tmp_path / "records.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text[i] for i in order) + "\n")
    expected = {int(np.flatnonzero(order == len(GOOD) + n)[0]): r.split("/")[0] for n, r in enumerate(BAD)}

    config, tokenizer = ProcessorConfig.from_folder(model), Tokenizer.from_folder(model)
    ids = (config.image_token_id, config.video_token_id)
    shape = RowShape(VisionGeometry(merge_size=2, position_side=8, window=0), ids, 1536, (64, 256, 1024), (64, 256))
    options = LoaderOptions(batch_size, questions_per_video=batch_size)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_rate=1.0)
    seen = []
    with Encoder(config, tokenizer, VideoOptions(num_frames=8), max_tokens=1024) as encoder:
        mixture = Mixture([RecordFile(path, root)])
        with GroupStream(mixture, GroupEncoder(mixture.sources, encoder), quarantine, options) as stream:
            loader = Loader(stream, shape)
            while stream.position < stream.order.sources[0].groups:
                seen += next_batch(loader).keys
    good = [f"records.jsonl#{i}" for i in range(len(lines)) if i not in expected]
    assert sorted(seen) == sorted(good)
    rows = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert {row["index"]: row["reason"] for row in rows} == expected and len(rows) == len(expected)
    assert all(row["key"] == f"records.jsonl#{row['index']}" and 20 < len(row["message"]) < 1300 for row in rows)
