"""Reads the records of a JSONL file like MLLM4D-R1-30k.jsonl as questions that a teacher writes reasoning for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.store.parts import StoreError, canonical_json
from data_prep.teacher.json_schema import SchemaError, parse_json
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import Span
from mllm4d_jax.qa.options import split_question
from mllm4d_jax.qa.records import one_video, read_conversation, text_field, video_spans, without_placeholders
from mllm4d_jax.qa.rewards import Solution, is_metres, is_point

MAX_LINE_BYTES = 2**20
UNSPECIFIED = "unspecified"  # scenario of records that name none, as the released file's may


@dataclasses.dataclass(frozen=True)
class R1Question:
    """A question with its solution, and what was measured to compute it.

    Attributes:
      id: unique in the file; from the record's content where it brings none.
      scenario: the record's "question_type"; `UNSPECIFIED` without.
      source_id: source video, "" if unknown.
      scale: how far the metres can be trusted, as curation wrote it (`scenes.scene.SCALES`), "" if unknown.
      video: path below the media root; span: the part of it that is meant, None for all.
      system: the record's own system prompt, "" if it has none.
      prompt: what the user says, <video> included.
      options: letter -> text, read from the prompt; empty if it lists none.
      solution: answer and centres at the two states.
      frames: (i, j, count): the frames asked about, of `count` that the model sees; None if unknown.
      value: what was measured, metres: a number or three; None if unknown.
      label: the true label, "" for a distance or if unknown.
      object_name: what the prompt calls the object, "" if there is none or it is unknown.
    """

    id: str
    scenario: str
    source_id: str
    scale: str
    video: str
    span: Span | None
    system: str
    prompt: str
    options: Mapping[str, str]
    solution: Solution
    frames: tuple[int, int, int] | None
    value: float | tuple[float, ...] | None
    label: str
    object_name: str

    @property
    def question(self) -> str:
        """The prompt without its placeholder."""
        return without_placeholders(self.prompt)


def read_items(path: str | Path) -> tuple[list[R1Question], int]:
    """Return all questions of a JSONL file sorted by id, and how many lines only repeated an earlier record.

    A record is in one of the layouts of `qa.records`, with one question about one video and a "solution" (see
    `rewards.Solution.from_record`); a last answer is left out. Optional: "id", "question_type", "source_id", "scale",
    "label", "value", "object_name", "frames", as `export.r1_record` writes them.

    Raises:
      RecordError: the file cannot be read or is empty, a record is wrong, or two differ and share an id.
    """
    found: dict[str, tuple[int, bytes, R1Question]] = {}
    repeated = 0
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line.decode("utf-8"))
            content = canonical_json(record)
        except (SchemaError, UnicodeDecodeError, StoreError) as error:
            raise RecordError(str(error), "bad_json", where) from error
        if not isinstance(record, dict):
            raise RecordError(f"a record is a JSON object, not {shown(record)}", key=where)
        item = parse_item(record, where, fallback_id=f"r1-{hashlib.sha256(content).hexdigest()[:20]}")
        first, other, _ = found.setdefault(item.id, (number, content, item))
        if other != content:
            raise RecordError(f"'id' {item.id!r} is also that of line {first}, which says something else", key=where)
        repeated += first != number
    if not found:
        raise RecordError(f"{path} holds no records")
    return [found[key][2] for key in sorted(found)], repeated


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of every line that is not blank."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise RecordError(f"{path}, line {number} has more than {MAX_LINE_BYTES} bytes: is it JSONL?")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise RecordError(f"records {path} cannot be read: {error.strerror or error}") from error


def parse_item(record: Mapping[str, Any], where: str, fallback_id: str) -> R1Question:
    """Return one decoded record as a question. Raises RecordError, which begins with `where` and names the field."""
    try:
        video, (system, prompt) = one_video(record), read_conversation(record).question()
        return R1Question(
            id=text_field(record, "id", fallback_id),
            scenario=text_field(record, "question_type", UNSPECIFIED),
            source_id=text_field(record, "source_id", ""),
            scale=text_field(record, "scale", ""),
            video=video,
            span=video_spans(record, 1)[0],
            system=system or "",
            prompt=prompt,
            options=split_question(prompt)[1],
            solution=Solution.from_record(record.get("solution")),
            frames=_frames(record.get("frames")),
            value=_value(record.get("value")),
            label=text_field(record, "label", ""),
            object_name=text_field(record, "object_name", ""),
        )
    except RecordError as error:
        raise error.with_key(where) from None


def _frames(frames: Any) -> tuple[int, int, int] | None:
    if frames is None:
        return None
    seen = frames.get("seen") if isinstance(frames, dict) else None
    numbers = [*seen, frames.get("count")] if isinstance(seen, list) else []
    whole = len(numbers) == 3 and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if not whole or not 0 <= numbers[0] < numbers[1] < numbers[2]:
        wanted = "{'seen': [i, j], 'count': n}, whole numbers with 0 <= i < j < n"
        raise RecordError(f"'frames' must be {wanted}, not {shown(frames)}")
    return tuple(numbers)


def _value(value: Any) -> float | tuple[float, ...] | None:
    if value is None:
        return None
    if is_point(value):
        return tuple(map(float, value))
    listed = value if isinstance(value, list) else [value]
    if len(listed) != 1 or not is_metres(listed[0]):
        raise RecordError(f"'value' must be a number of metres, alone or in a list, or three, not {shown(value)}")
    return float(listed[0])
