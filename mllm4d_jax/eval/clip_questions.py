"""Questions about one clip: as a person types them, or as a record has them, with what is known of their answers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.eval.asking import Manner
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import is_file
from mllm4d_jax.qa import benchmarks
from mllm4d_jax.qa.errors import RecordError, SolutionError, did_you_mean
from mllm4d_jax.qa.options import lettered, split_label, split_question
from mllm4d_jax.qa.records import (
    LAYOUTS,
    Record,
    as_prompt,
    check_text,
    fields_of,
    media_files,
    parse_record,
    unanswered,
    without_placeholders,
)
from mllm4d_jax.qa.rewards import Solution

_BAR = re.compile(r"(?:^|\s)\|(?=\s|$)")  # between a question and its options on one line
_MOST_OPTIONS = 26
_NAMED = 3  # keys of a file that an error names


class ClipQuestionError(ValueError):
    """There are no such questions."""


@dataclass(frozen=True)
class ClipQuestion:
    """One question about the clip.

    Attributes:
      record: the conversation to be continued; its key names the question in messages.
      text: what is asked, without options.
      choices: letter -> option; {} for a question that is answered freely.
      truth: letters of the right options, or else the answer as the record has it; () where it is not known.
      solution: the record's centres; None without them.
      notes: what the record has and could not be read.
    """

    record: Record
    text: str
    choices: Mapping[str, str]
    truth: tuple[str, ...] = ()
    solution: Solution | None = None
    notes: tuple[str, ...] = field(default=())


def typed_question(text: str, key: str, media: Sequence[Mapping[str, Any]], manner: Manner) -> ClipQuestion:
    """Return the question that a person has written.

    Options stand behind it, `Which way? | left | right` or `Which way? | A. left | B. right`; or it has them already in
    lines of their own, and is asked to the letter.

    Args:
      key: its name.
      media: the parts of a message that show the clip.

    Raises:
      RecordError: nothing is asked, or the options are none.
    """
    try:
        check_text(text, "the question")
        question, *options = (part.strip() for part in _BAR.split(text))
        if not question:
            raise RecordError(f"nothing is asked in {shown(text)}", "no_question")
        choices = _options(options)
    except RecordError as error:
        raise error.with_key(key) from None
    asked = manner.text(question, choices)
    if not choices:
        try:
            question, choices = split_question(question)
        except RecordError:  # lines with letters that are no options
            choices = {}
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": asked}]}]
    return ClipQuestion(manner.conversation(key, messages), question, choices)


def _options(options: Sequence[str]) -> dict[str, str]:
    if not options:
        return {}
    if not 2 <= len(options) <= _MOST_OPTIONS or not all(options):
        raise RecordError(f"it has the options {shown(list(options))}: there must be 2 to {_MOST_OPTIONS}, none blank")
    found = [split_label(option) or ("", option) for option in options]
    texts = lettered(text for _, text in found)
    labelled = [letter for letter, _ in found] == list(texts) and all(texts.values())
    return texts if labelled else lettered(options)


def typed_questions(
    lines: Sequence[str], name: str, media: Sequence[Mapping[str, Any]], manner: Manner
) -> list[ClipQuestion]:
    """Return the question of each line that is not blank. Raises RecordError, which names the line of the file."""
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    return [typed_question(line, f"{name}, line {n}", media, manner) for n, line in numbered]


def read_questions(path: str, media: Sequence[Mapping[str, Any]], manner: Manner) -> list[ClipQuestion]:
    """Return the questions of a text file, one on each line.

    Raises:
      ClipQuestionError: it cannot be read, or holds none; RecordError: a line is no question.
    """
    if Path(path).suffix in (".json", ".jsonl"):
        raise ClipQuestionError(f"questions = {path} is a file of records: name one with --config.record={path}:KEY")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ClipQuestionError(f"questions = {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ClipQuestionError(f"questions = {path} is not UTF-8 text (byte {error.start})") from error
    found = typed_questions(lines, Path(path).name, media, manner)
    if not found:
        raise ClipQuestionError(f"questions = {path} holds no question: write one on each line")
    return found


def record_questions(spec: str, root: str, manner: Manner) -> list[ClipQuestion]:
    """Return the questions that `FILE:KEY` names, see the config key `record`.

    Args:
      root: folder of their clips; '' for that of the file.

    Raises:
      ClipQuestionError: no such file or key; RecordFileError, RecordError: what is there cannot be used.
    """
    file, key = _split(spec)
    records = RecordFile(file, root or os.path.dirname(file) or ".")
    numbered = _number(key, records)
    found = [(numbered, records.raw(numbered))] if numbered is not None else list(_named(key, records))
    return [_record_question(raw, records.key(n), str(records.root), manner) for n, raw in found]


def _split(spec: str) -> tuple[str, str]:
    """(file, key): the shortest beginning that names a file and has a colon behind it."""
    ends = [n for n, letter in enumerate(spec) if letter == ":" and is_file(spec[:n])]
    if ends and spec[ends[0] + 1 :].strip():
        return spec[: ends[0]], spec[ends[0] + 1 :].strip()
    if ends or is_file(spec):
        raise ClipQuestionError(f"record = {spec} names a file and no record in it: write FILE:KEY, e.g. {spec}:0")
    raise ClipQuestionError(f"record = {spec}: no such file of records; write FILE:KEY")


def _number(key: str, records: RecordFile) -> int | None:
    """The number of a record that a key gives, as "17" or as "file.json#17"; None for another kind of key."""
    digits = key.removeprefix(f"{records.path.name}#")
    if not (digits.isascii() and digits.isdigit()):
        return None
    if len(digits) > 18 or int(digits) >= len(records):
        raise ClipQuestionError(f"record {key}: {records.name} has {len(records)} records, numbered from 0")
    return int(digits)


def _named(key: str, records: RecordFile) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the records with this id, or else about this video."""
    by_video, known, broken = [], {}, 0
    for n in range(len(records)):
        try:
            raw = records.raw(n)
            videos = media_files(raw, "video")
        except RecordError:
            broken += 1
            continue
        if raw.get("id") == key:
            yield n, raw
            return
        by_video += [(n, raw)] if key in videos else []
        known |= dict.fromkeys(name for name in (raw.get("id"), *videos) if isinstance(name, str))
    if not by_video:
        unread = f" ({broken} of its records cannot be read)" if broken else ""
        some = ", ".join(map(shown, list(known)[:_NAMED]))
        raise ClipQuestionError(
            f"record: {records.name} has no id and no video {shown(key)}{did_you_mean(key, known)}{unread}; it has "
            f"{len(records)} records, numbered from 0" + (f", and names such as {some}" if some else "")
        )
    yield from by_video


def _record_question(raw: Mapping[str, Any], key: str, root: str, manner: Manner) -> ClipQuestion:
    """The question of one record. Raises RecordError."""
    raw = fields_of(raw)
    try:
        item, notes = benchmarks.record_question(raw, key, key, root), []
    except RecordError as error:
        if LAYOUTS.keys().isdisjoint(raw):
            raise error.with_key(key) from None
        item, notes = None, [f"it has no options with a known answer: {error.message}"]
    solution = None
    if raw.get("solution") is not None:
        try:
            solution = Solution.from_record(raw["solution"])
        except SolutionError as error:
            notes.append(error.message)
    if LAYOUTS.keys().isdisjoint(raw):
        return ClipQuestion(manner.record(item), item.question, item.choices, item.truth, solution, tuple(notes))
    given = parse_record(raw, key, root)
    record = manner.conversation(key, as_prompt(given).messages)
    if item is not None:
        return ClipQuestion(record, item.question, item.choices, item.truth, solution, tuple(notes))
    parts = record.messages[-1]["content"]
    text = without_placeholders("\n".join(part["text"] for part in parts if part["type"] == "text"))
    replies = given.messages[len(unanswered(given.messages)) :]
    truth = (solution.answer,) if solution else tuple(reply["content"] for reply in replies[-1:])
    return ClipQuestion(record, text, {}, truth, solution, tuple(notes))
