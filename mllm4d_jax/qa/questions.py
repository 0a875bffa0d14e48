"""What a question of a benchmark is, whether it asks for one of its options or for a number."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mllm4d_jax.files.quoting import shown
from mllm4d_jax.qa.answers import same_option, true_letters
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import Span
from mllm4d_jax.qa.options import split_label
from mllm4d_jax.qa.records import check_text, fields_of

_MOST_ID = 500  # characters; ids stand in many places


@dataclass(frozen=True)
class AskedQuestion:
    """What a question of a benchmark is, and by what its answer is judged.

    Attributes:
      id: unique in the benchmark.
      benchmark: a key of `benchmarks.PARSERS`.
      split: "real", "synthetic", "bench", "test", or the file's name without suffix.
      category, subtask: what tables are grouped by; None = the benchmark has no such thing.
      video: the path as the benchmark names it; questions with the same one are not independent.
      media: where that file is, None if no root is given; in predictions with the part that is meant (`named_part`).
      question: the text without options.
      choices: letter -> option text, in the file's order.
      answer: the truth as the file gives it: a letter, an option's text, or a number.
      truth: the letters whose option is right; () where a number is asked for.
      true_number: the number that is asked for, above 0; None where a letter is. `choices` is then empty.
    """

    id: str
    benchmark: str
    split: str
    category: str | None
    subtask: str | None
    video: str
    media: str | None
    question: str
    choices: Mapping[str, str]
    answer: str
    truth: tuple[str, ...]
    true_number: float | None = dataclasses.field(default=None, kw_only=True)


@dataclass(frozen=True)
class BenchmarkQuestion(AskedQuestion):
    """One question as its file has it.

    Attributes:
      prompt: the user's whole text as file or benchmark have it, with <video> once, or with a placeholder for each of
        `files`; None = to be composed from question and choices.
      direct_prompt: the same with the benchmark's own request for nothing but the answer, for asking directly; None =
        `prompt` holds all there is.
      system: the system message that the file brings; None = it has none.
      span: which part of the video is meant; None = all of it.
      files: "video" and "image" -> their files, in the order of the placeholders in `prompt`; None = the one video of
        `media`, or no root is given.
    """

    prompt: str | None = None
    direct_prompt: str | None = None
    system: str | None = None
    span: Span | None = None
    files: Mapping[str, tuple[str, ...]] | None = None


# (record, name of its file without suffix, name of the record, folder of the videos or None) -> question
ParseFn = Callable[[Mapping[str, Any], str, str, "str | None"], BenchmarkQuestion]


def question_id(raw: Mapping[str, Any], key: str) -> str:
    """Return the record's `id`, or its key without one. Raises RecordError for what can be no id."""
    found = key if raw.get("id") is None else raw["id"]
    if not isinstance(found, str | int) or not 0 < len(str(found).strip()) <= _MOST_ID:
        raise RecordError(
            f"'id' must be a text or a whole number, of at most {_MOST_ID} characters, not {shown(found)}"
        )
    check_text(str(found), "'id'")
    return str(found)


def option_texts(value: Any) -> Mapping[str, str]:
    """Return letter -> text of a record's options. Raises RecordError unless there are two or more, all usable.

    A letter with null is none of them: rows of a table have as many letters as the one with the most options.
    """
    options = fields_of(value) if isinstance(value, Mapping) else {}
    if len(options) < 2:
        raise RecordError(f"'choices' must be an object with two options or more, not {shown(value)}")
    for letter, option in options.items():
        if len(letter) != 1 or letter not in string.ascii_uppercase:
            raise RecordError(f"'choices' must have capital letters as keys, not {shown(letter)}")
        usable = isinstance(option, str | int | float) and not isinstance(option, bool)
        if not usable or not str(option).strip():
            raise RecordError(f"option {letter} must be a text or a number, not {shown(option)}")
        check_text(str(option), f"option {letter}")
    return MappingProxyType({letter: str(option) for letter, option in options.items()})


def letters_of(choices: Mapping[str, str], answer: Any) -> tuple[str, ...]:
    """Return the letters of the options with the text of the answer. Raises RecordError if none has it."""
    truth = true_letters(choices, answer)
    if not truth:
        answer_said = shown(answer)
        raise RecordError(f"'answer' is {answer_said}, which is none of the options {shown(dict(choices))}")
    return truth


def answer_letters(choices: Mapping[str, str], answer: Any) -> tuple[str, ...]:
    """Return the right letters for an answer given as a letter, as `A. text`, or as the text of an option."""
    letter, text = split_label(str(answer)) or ("", "")
    if letter in choices and (not text or same_option(text) == same_option(choices[letter])):
        answer = choices[letter]
    return letters_of(choices, answer)
