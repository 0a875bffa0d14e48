"""Clip results -> the released record files, a list of what was rejected, and a manifest.

The files are assembled from the parts in the order of the clip ids, so their bytes depend on the results alone: not on
the number of workers, on the order in which clips were done, or on how often the run was killed in between.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.store.parts import ClipResult, PartStore, StoreError
from mllm4d_jax import __version__
from mllm4d_jax.files.atomic import open_atomic, remove_partials, write_atomic
from mllm4d_jax.qa.benchmarks import MULTIPLE_CHOICE
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.reasoning import Vec3
from mllm4d_jax.qa.records import ROLES, read_conversation
from mllm4d_jax.qa.rewards import Solution, solution_fields

MANIFEST_FORMAT = 2
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
_TEXT_FIELDS = ("id", "source_id", "video", "question", "answer", "question_type")
_NOTED = ("source_id", "scale", "label", "object_name", "frames")  # of a row, in r1 records
# The release's loader takes every speaker but "user" and "system" for the assistant, "human" too.
_SPEAKERS = {"user": "user", "system": "system", "assistant": "gpt"}


# File name (`.json` is one JSON list, `.jsonl` one object a line) -> the split whose rows go into it, row -> record.
Outputs = Mapping[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]]]


def check_row(row: Mapping[str, Any], source_id: str) -> None:
    """Check a question row, as `data_prep.questions.propose.Question.record` makes it.

    Fields: "id" (unique in the data set), "source_id", "video" (path relative to the media root), "question",
    "options" (object, letter -> text, letters from A on), "answer" (letter), "question_type", "conversations" (turns
    {"from": "system" | "user" | "gpt", "value"}; one <video>, in a user's turn; the last is gpt's), "solution" (object
    with "camera_center" and "object_center": per state, start and end, [x, y, z] in metres or null). More
    fields may be there.

    Raises:
      StoreError: naming the row and the field.
    """
    key = row.get("id")

    def fail(what: str) -> None:
        raise StoreError(f"question {key!r}: {what}")

    for field in _TEXT_FIELDS:
        if not isinstance(row.get(field), str) or not row[field].strip():
            fail(f"'{field}' must be a text that is not empty, not {row.get(field)!r}")
    if row["source_id"] != source_id:
        fail(f"'source_id' is {row['source_id']!r}, its clip's is {source_id!r}")
    video = PurePosixPath(row["video"])
    if video.is_absolute() or ".." in video.parts or "\\" in row["video"]:
        fail(f"'video' must be a path below the media root, with '/', not {row['video']!r}")
    options = row.get("options")
    if not isinstance(options, Mapping) or not 2 <= len(options) <= 26:
        fail("'options' must be an object with 2 to 26 options")
    if sorted(options) != list(string.ascii_uppercase[: len(options)]):
        fail(f"'options' must have the letters from A on, not {sorted(options)}")
    texts = list(options.values())
    if not all(isinstance(o, str) and o.strip() for o in texts) or len(set(texts)) != len(texts):
        fail(f"'options' must be texts that differ, not {texts!r}")
    if row["answer"] not in options:
        fail(f"'answer' must be the letter of one of the {len(options)} options, not {row['answer']!r}")
    try:
        last, solution = read_conversation(row).turns[-1], solution_fields(row.get("solution"))
        Solution.from_record({"answer": row["answer"]} | dict(solution))
    except RecordError as error:
        fail(error.message)
    if last["role"] != "assistant":
        fail("'conversations' must end with a turn of gpt")
    if solution.get("answer", row["answer"]) != row["answer"]:
        fail(f"'solution' says {solution['answer']!r}, 'answer' {row['answer']!r}")
    missing = {"camera_center", "object_center"} - solution.keys()
    if missing:
        fail(f"'solution' has no {', '.join(sorted(missing))}")


def check_result(result: ClipResult) -> None:
    """Check a clip's rows and rejections. Raises StoreError naming clip, row and field."""
    seen = set()
    for row in result.rows:
        try:
            check_row(row, result.source_id)
        except StoreError as error:
            raise StoreError(f"clip {result.clip_id!r}: {error}") from error
        if row["id"] in seen:
            raise StoreError(f"clip {result.clip_id!r}: two questions have the id {row['id']!r}")
        seen.add(row["id"])
    if result.rows and not (result.split and result.source_id):
        raise StoreError(f"clip {result.clip_id!r} has questions but no split or no source_id")
    for entry in result.rejected:
        if not all(isinstance(entry.get(field), str) for field in ("reason", "detail")):
            raise StoreError(f"clip {result.clip_id!r}: a rejection needs the texts 'reason' and 'detail': {entry!r}")


def conversation_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as in MLLM4D-2M.json, plus what its readers ignore: "id", "question_type", and "scale" if known.

    Who speaks is written as the release's loader reads it (`_SPEAKERS`).
    """
    turns = [{"from": _SPEAKERS[ROLES[turn["from"]]], "value": turn["value"]} for turn in row["conversations"]]
    record = {"id": row["id"], "video": row["video"], "conversations": turns, "question_type": row["question_type"]}
    return record | ({"scale": row["scale"]} if "scale" in row else {})


def r1_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as in MLLM4D-R1-30k.jsonl: the prompt as messages without the last answer, and the solution.

    Its readers ignore "id", "question_type" and, where the row has them, "source_id", "scale", "label", "value",
    "object_name" and "frames": what a teacher needs to write the reasoning (`data_prep.cold_start.r1_items`). "value"
    is a list of one number or of three, because a column of Hugging Face datasets has one type.
    """
    prompt = row["conversations"][:-1]
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in prompt]
    value = {"value": np.atleast_1d(row["value"]).astype(float).tolist()} if "value" in row else {}
    return {
        "id": row["id"],
        "messages": messages,
        "videos": [row["video"]],
        "solution": [_solution(row)],
        "question_type": row["question_type"],
        **{field: row[field] for field in _NOTED if field in row},
        **value,
    }


def bench_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a question to be scored: the conversation record and its parts one by one, as in VLM4D.

    The release's evaluator takes "multiple-choice" alone for a "question_type" (the scenario is the "category"), and
    judges by the text of the right option, not by its letter; our own readers take either.
    """
    choices = {letter: row["options"][letter] for letter in sorted(row["options"])}
    return conversation_record(row) | {
        "question_type": MULTIPLE_CHOICE,
        "category": row["question_type"],
        "question": row["question"],
        "choices": choices,
        "answer": choices[row["answer"]],
        "source_id": row["source_id"],
        "solution": [_solution(row)],
    }


def _solution(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the solution in one form: lists of [x, y, z] in floats; a kind that no state has is an empty list.

    Rewards read nulls alone and nothing alike, but Hugging Face datasets 4.8 crashes on a list that ends in null.
    """
    read = Solution.from_record(dict(solution_fields(row["solution"])) | {"answer": row["answer"]})

    def listed(centers: Sequence[Vec3 | None]) -> list[list[float] | None]:
        return [center and list(center) for center in centers] if any(centers) else []

    centers = {"camera_center": listed(read.camera_center), "object_center": listed(read.object_center)}
    return {"answer": read.answer} | centers


class RecordWriter:
    """Streams records into a JSON list or JSONL file with the same bytes every time. A context manager."""

    def __init__(self, path: str | Path) -> None:
        """Take a file name that ends in .json or .jsonl. Raises StoreError: any other."""
        self._opening, self._file = open_atomic(path), None
        self._hash, self._bytes, self.records = hashlib.sha256(), 0, 0
        self._list = Path(path).suffix == ".json"
        if Path(path).suffix not in (".json", ".jsonl"):
            raise StoreError(f"{path}: an output is a .json or a .jsonl file")

    def __enter__(self) -> RecordWriter:
        self._file = self._opening.__enter__()
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Raises StoreError for what JSON does not have (NaN, half a surrogate pair)."""
        try:
            data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            raise StoreError(f"record {record.get('id')!r} cannot be written as JSON: {error}") from error
        lead = (b",\n" if self.records else b"[\n") if self._list else b""
        self._put(lead + data + (b"" if self._list else b"\n"))
        self.records += 1

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def __exit__(self, *error: Any) -> None:
        if self._list and error[0] is None:
            self._put(b"\n]\n" if self.records else b"[]\n")
        self._opening.__exit__(*error)

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says about the file."""
        return {"sha256": self._hash.hexdigest(), "bytes": self._bytes, "records": self.records}


def assemble(
    store: PartStore,
    clip_ids: Sequence[str],
    folder: str | Path,
    outputs: Outputs,
    keep: Callable[[str], bool] = lambda question_id: True,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write all output files, `rejected.jsonl` and, last, `manifest.json`.

    Every part is read once, in the order of the sorted clip ids, and nothing but ids and counts is kept, so the size of
    the data set does not matter. A manifest that is there means that all files it names are complete.

    Args:
      keep: question id -> whether it is written (`balance.select` chooses).
      settings: by what they were chosen, JSON values; beside the store's config in the manifest.

    Returns:
      The manifest.

    Raises:
      StoreError: a part is missing or wrong, a question id occurs twice, a source video is in two splits, a split is
        in no output, an output has an unusable name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (*outputs, REJECTED, MANIFEST):
        remove_partials(folder, f"{name}.*")
    tally = _Tally({split for split, _ in outputs.values()})
    with ExitStack() as stack:
        writers = {name: stack.enter_context(RecordWriter(folder / name)) for name in (*outputs, REJECTED)}
        for clip_id in tqdm(sorted(clip_ids), unit="clip"):
            result = store.read(clip_id)
            check_result(result)
            tally.propose(result)
            result = dataclasses.replace(result, rows=tuple(row for row in result.rows if keep(row["id"])))
            tally.add(result)
            for name, (split, layout) in outputs.items():
                if split == result.split:
                    for row in result.rows:
                        writers[name].write(layout(row))
            for entry in result.rejected:
                writers[REJECTED].write({"clip_id": result.clip_id, "source_id": result.source_id} | dict(entry))
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": __version__,
        "seed": store.seed,
        "config": store.config | dict(settings),
        **tally.summary(),
        "files": {name: writer.summary() for name, writer in sorted(writers.items())},
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / MANIFEST, f"{text}\n".encode())
    return manifest


class _Tally:
    """Counts for the manifest, and the checks that need more than one clip."""

    def __init__(self, splits: set[str]) -> None:
        self._splits = splits
        self._split_of: dict[str, str] = {}
        self._ids: set[int] = set()  # 64 bits of a hash each: a set of the ids themselves would take gigabytes
        self._questions: dict[str, Counter[str]] = {split: Counter() for split in splits}
        self._scales: dict[str, Counter[str]] = {split: Counter() for split in splits}
        self._proposed: dict[str, Counter[str]] = {split: Counter() for split in splits}
        self._clips: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def propose(self, result: ClipResult) -> None:
        """Count the questions of a clip before any are left out."""
        if result.split in self._proposed:
            self._proposed[result.split].update(row["question_type"] for row in result.rows)

    def add(self, result: ClipResult) -> None:
        self._clips["total"] += 1
        self._rejected.update(entry["reason"] for entry in result.rejected)
        if not result.rows:
            self._clips["without_questions"] += 1
            return
        if result.split not in self._splits:
            raise StoreError(f"clip {result.clip_id!r} is in split {result.split!r}, which no output takes")
        other = self._split_of.setdefault(result.source_id, result.split)
        if other != result.split:
            raise StoreError(
                f"source video {result.source_id!r} is in split {other!r} and, with clip {result.clip_id!r}, in "
                f"{result.split!r}: split by source video"
            )
        for row in result.rows:
            key = int.from_bytes(hashlib.blake2b(row["id"].encode("utf-8", "surrogatepass"), digest_size=8).digest())
            if key in self._ids:
                raise StoreError(f"question id {row['id']!r} of clip {result.clip_id!r} occurs twice in the data set")
            self._ids.add(key)
            self._questions[result.split][row["question_type"]] += 1
            self._scales[result.split][row.get("scale", "unknown")] += 1

    def summary(self) -> dict[str, Any]:
        return {
            "clips": dict(self._clips),
            "source_videos": dict(Counter(self._split_of.values())),
            "questions": {split: dict(counts) for split, counts in self._questions.items()},
            "scales": {split: dict(counts) for split, counts in self._scales.items()},
            "proposed": {split: dict(counts) for split, counts in self._proposed.items()},
            "rejected": dict(self._rejected),
        }
