"""TFDS sets of clips (ArrayRecords, as `data_prep.store.builder` writes them) read as records: one per question."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.files import digests
from mllm4d_jax.files.cache import copied_folder
from mllm4d_jax.media.stored_frames import StoredFrames
from mllm4d_jax.qa.errors import MediaError, RecordError
from mllm4d_jax.qa.records import Record, parse_record

log = logging.getLogger(__name__)

DEFAULT_SPLIT = "train"
_SAMPLED = 1 << 18  # bytes read of each of many files


class ClipSet:
    """Random access to the questions of a TFDS set; a clip's frames are stored once, beside its questions.

    Needs tensorflow-datasets (never TensorFlow); it is imported when a set is opened.

    Attributes:
      path: the folder of the set's version, with `features.json`; of one in a bucket a copy (`files.cache`).
      split: of the set.
      system_prompt: given to records that bring none; '' for none.
      digest: sha256 over the set's description, and names, sizes and samples of its files (`files.digests`).
      clips: i32 per record, the number of its clip.
    """

    def __init__(self, path: str | Path, split: str = DEFAULT_SPLIT, system_prompt: str = "") -> None:
        """Opens the set. If its `source.json` does not say how many questions each clip has, every clip is read once.

        Raises:
          RecordFileError: no set of clips there, no such split, or a `source.json` that does not fit.
        """
        self.path, self.split, self.system_prompt = copied_folder(path), split, system_prompt
        self._called = str(path)
        self._source = _open(self.path, split)
        self._last: tuple[int, Mapping[str, Any]] | None = None
        counts = _noted_counts(self.path, split, len(self._source))
        if counts is None:
            log.info("counting the questions of %d clips in %s", len(self._source), self.name)
            counts = [len(self._source[n]["questions"]["row"]) for n in range(len(self._source))]
        self.clips = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.digest = _digest(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    @property
    def name(self) -> str:
        """What messages call the whole set."""
        return f"{self._called}@{self.split}"

    def __len__(self) -> int:
        return len(self.clips)

    def key(self, i: int) -> str:
        """The name of record i in every message about it: `mllm4d@train#i`."""
        return f"{self.path.parent.name}@{self.split}#{i}"

    def __getitem__(self, i: int) -> Record:
        """Record i; its video is the clip's stored frames.

        Raises:
          RecordError: as `parse_record`, "bad_record", or MediaError "missing_fps".
        """
        n, key = int(self.clips[i]), self.key(i)
        if self._last is None or self._last[0] != n:  # the questions of a group come one after the other
            self._last = (n, self._source[n])
        clip = self._last[1]
        try:
            rows = clip["questions"]["row"]
            if len(rows) != self._first[n + 1] - self._first[n]:
                raise RecordError(f"its clip has {len(rows)} questions, source.json says otherwise: delete that file")
            row = json.loads(rows[i - int(self._first[n])])
            frames = self._frames(n, clip)
        except RecordError as error:
            raise error.with_key(key) from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise RecordError(f"the stored question cannot be read: {error!r}", key=key) from error
        if not isinstance(row, dict):
            raise RecordError(f"is a {type(row).__name__}, not an object with a conversation", key=key)
        record = parse_record(row, key, self.path, self.system_prompt)
        messages = [m | {"content": _with_frames(m["content"], frames, key)} for m in record.messages]
        return dataclasses.replace(record, messages=tuple(messages))

    def _frames(self, n: int, clip: Mapping[str, Any]) -> StoredFrames:
        name = f"{self.name} clip {n}"
        timing = json.loads(clip["timing"])  # "fps" itself is rounded to float32
        if not isinstance(timing, dict) or not isinstance(timing.get("fps"), (int, float)):
            raise MediaError(f"{name} does not say how many frames per second its source has", "missing_fps")
        jpegs, indices = tuple(clip["frames"]), tuple(int(v) for v in clip["frame_indices"])
        times = tuple(float(v) for v in timing.get("timestamps") or ())
        return StoredFrames(name, jpegs, indices, times, float(timing["fps"]), int(clip["num_source_frames"]))


def _open(path: Path, split: str) -> Any:
    if not (path / "features.json").is_file():
        raise RecordFileError(f"{path}: no TFDS set here (features.json is missing); name the folder of its version")
    import tensorflow_datasets as tfds  # takes a second, and only sets of this kind need it

    builder = tfds.builder_from_directory(path)
    if split not in builder.info.splits:
        raise RecordFileError(f"{path} has no split '{split}' (it has {', '.join(sorted(builder.info.splits))})")
    wanted = {"questions", "frames", "frame_indices", "timing", "num_source_frames"}
    if not wanted <= set(builder.info.features):
        raise RecordFileError(
            f"{path} is no set of clips with questions: it lacks {sorted(wanted - set(builder.info.features))}"
        )
    return builder.as_data_source(split)


def _noted_counts(path: Path, split: str, clips: int) -> list[int] | None:
    """Questions per clip in the order of the split's records, as the set's builder noted them; None if it did not."""
    note = path / "source.json"
    if not note.is_file():
        return None
    try:
        content = json.loads(note.read_bytes())
        if content.get("questions") is None:
            return None
        counts = [int(content["questions"][clip]) for shard in content["shards"][split] for clip in shard]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise RecordFileError(f"{note} is damaged ({error!r}): delete it, and all clips are counted instead") from error
    if len(counts) != clips:
        raise RecordFileError(f"{note} speaks of {len(counts)} clips, the split '{split}' has {clips}: delete it")
    return counts


def _digest(path: Path) -> str:
    files = sorted(p for p in path.iterdir() if p.is_file())
    described = [file for file in files if file.suffix == ".json"]
    stored = digests.all_sampled(path, [file for file in files if file.suffix != ".json"], _SAMPLED)
    texts = [file.name.encode() + file.read_bytes() for file in described]
    return hashlib.sha256(b"\n".join([*texts, *(line.encode() for line in stored)])).hexdigest()


def _with_frames(content: Any, frames: StoredFrames, key: str) -> Any:
    """The content of a message, its video part being the stored frames."""
    if isinstance(content, str):
        return content
    if any(part["type"] == "image" for part in content):
        raise RecordError("names an image, but a set of clips stores the frames of one video only", key=key)
    stored = {"type": "video", "frames": frames}
    return [
        stored | ({"span": part["span"]} if "span" in part else {}) if part["type"] == "video" else part
        for part in content
    ]
