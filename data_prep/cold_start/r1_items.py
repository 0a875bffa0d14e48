"""Reads records in the layout of MLLM4D-R1-30k.jsonl as items that a teacher writes reasoning for."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.store.parts import ExportError, canonical_json
from data_prep.teacher.json_schema import SchemaError, parse_json
from mllm4d_jax.qa.rewards import Solution

MAX_LINE_BYTES = 2**20
UNSPECIFIED = "unspecified"  # scenario of records that name none, as the released file's may
_OPTION = re.compile(r"^\s*\(?([A-Z])[.:)]\s*(\S.*?)\s*$", re.MULTILINE)


class ItemError(ValueError):
    """A record cannot be used; the message names file, line and key."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A question with its solution, and what was measured to compute it.

    Attributes:
      id: unique in the file; from the record's content where it brings none.
      scenario: the record's "question_type"; `UNSPECIFIED` without.
      source_id: source video, "" if unknown.
      video: path below the media root.
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
    video: str
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
        return self.prompt.replace("<video>", "").strip()


def read_items(path: str | Path) -> tuple[list[Item], int]:
    """All items of a JSONL file sorted by id, and how many lines only repeated an earlier record.

    Fields: "messages" (turns {"role": "system" | "user" | "assistant", "content"}; a last answer is left out; <video>
    once), "videos" (one path, or a list with one), "solution" (see `rewards.Solution.from_record`). Optional: "id",
    "question_type", "source_id", "label", "value", "object_name", "frames", as `export.r1_record` writes them.

    Raises:
      ItemError: the file cannot be read or is empty, a record is wrong, or two differ and have one id.
    """
    found: dict[str, tuple[int, bytes, Item]] = {}
    repeated = 0
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line.decode("utf-8"))
            content = canonical_json(record)
        except (SchemaError, UnicodeDecodeError, ExportError) as error:
            raise ItemError(f"{where}: {error}") from error
        if not isinstance(record, dict):
            raise ItemError(f"{where}: a record is a JSON object, not {_short(record)}")
        item = parse_item(record, where, fallback_id=f"r1-{hashlib.sha256(content).hexdigest()[:20]}")
        first, other, _ = found.setdefault(item.id, (number, content, item))
        if other != content:
            raise ItemError(f"{where}: 'id' {item.id!r} is also that of line {first}, which says something else")
        repeated += first != number
    if not found:
        raise ItemError(f"{path} holds no records")
    return [found[key][2] for key in sorted(found)], repeated


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of every line that is not blank."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ItemError(f"{path}, line {number} has more than {MAX_LINE_BYTES} bytes: is it JSONL?")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ItemError(f"records {path} cannot be read: {error.strerror or error}") from error


def parse_item(record: Mapping[str, Any], where: str, fallback_id: str) -> Item:
    """One decoded record. `where` begins the messages. Raises ItemError naming the key."""

    def fail(key: str, what: str) -> None:
        raise ItemError(f"{where}: '{key}' {what}, not {_short(record.get(key))}")

    texts = {}
    for key, default in (
        ("id", fallback_id),
        ("question_type", UNSPECIFIED),
        ("source_id", ""),
        ("label", ""),
        ("object_name", ""),
    ):
        texts[key] = record.get(key, default)
        if not isinstance(texts[key], str) or (default and not texts[key].strip()):
            fail(key, "must be a text" + (" that is not empty" if default else ""))
    system, prompt = _turns(record.get("messages"), fail)
    try:
        solution = Solution.from_record(record.get("solution"))
    except ValueError as error:
        raise ItemError(f"{where}: {error}") from error
    return Item(
        id=texts["id"],
        scenario=texts["question_type"],
        source_id=texts["source_id"],
        video=_video(record.get("videos"), fail),
        system=system,
        prompt=prompt,
        options=_options(prompt),
        solution=solution,
        frames=_frames(record.get("frames"), fail),
        value=_value(record.get("value"), fail),
        label=texts["label"],
        object_name=texts["object_name"],
    )


def _turns(messages: Any, fail: Callable[[str, str], None]) -> tuple[str, str]:
    """(system prompt, user's text) of the messages."""
    wanted = "must be a list of turns {'role': 'system' | 'user' | 'assistant', 'content': text}"
    if not isinstance(messages, list) or not messages:
        fail("messages", wanted)
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            fail("messages", wanted)
    turns = [(turn.get("role"), turn["content"]) for turn in messages]
    if turns[-1][0] == "assistant":
        turns.pop()
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if [role for role, _ in turns] != ["user"]:
        fail("messages", "must be one turn of the user, after at most one of the system")
    prompt = turns[0][1]
    if prompt.count("<video>") != 1 or "<image>" in prompt:
        fail("messages", "must have <video> exactly once in what the user says, and no <image>")
    return system, prompt


def _video(videos: Any, fail: Callable[[str, str], None]) -> str:
    videos = [videos] if isinstance(videos, str) else videos
    if not isinstance(videos, list) or len(videos) != 1 or not isinstance(videos[0], str) or not videos[0].strip():
        fail("videos", "must be a list with the path of one video")
    return videos[0]


def _options(prompt: str) -> dict[str, str]:
    """Letters and texts of the lines after "Options:", as long as the letters follow each other from A."""
    _, marker, tail = prompt.partition("Options:")
    found: dict[str, str] = {}
    for letter, text in _OPTION.findall(tail) if marker else ():
        if letter == chr(ord("A") + len(found)):
            found[letter] = text
    return found


def _frames(frames: Any, fail: Callable[[str, str], None]) -> tuple[int, int, int] | None:
    if frames is None:
        return None
    seen = frames.get("seen") if isinstance(frames, dict) else None
    numbers = [*seen, frames.get("count")] if isinstance(seen, list) and len(seen) == 2 else []
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        fail("frames", "must be {'seen': [i, j], 'count': n} with whole numbers")
    if not 0 <= numbers[0] < numbers[1] < numbers[2]:
        fail("frames", "must have 0 <= i < j < count")
    return tuple(numbers)


def _value(value: Any, fail: Callable[[str, str], None]) -> float | tuple[float, ...] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, list) and len(value) == 3 else [value]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and _finite(v) for v in numbers):
        fail("value", "must be a number of metres, or three")
    return float(value) if numbers == [value] else tuple(float(v) for v in numbers)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a double
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
