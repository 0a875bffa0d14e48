"""Parsers of benchmarks: a record of one of their files -> a question.

- `vlm4d`: the VLM4D lists (real and synthetic), with or without published responses in them;
- `mllm4d`: held-out questions in the six subtasks of MLLM4D-Bench, as curation writes them (`bench.json`) or in one of
  the released record layouts with a `question_type`;
- `jsonl`: any questions in those layouts.

A new benchmark is a function here, its name in `PARSERS` and in the choices of the config key `benchmark`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import is_folder
from mllm4d_jax.qa.answers import same_option, true_letters
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import Span, resolve_media
from mllm4d_jax.qa.options import split_label, split_question
from mllm4d_jax.qa.reasoning import answer_part
from mllm4d_jax.qa.records import (
    LAYOUTS,
    Conversation,
    check_text,
    one_video,
    read_conversation,
    text_field,
    video_spans,
    without_placeholders,
)
from mllm4d_jax.qa.rewards import solution_fields

# The published id of the last question about a video that was filmed from outside; later ones are egocentric.
VLM4D_LAST_EXOCENTRIC = 922
_MOST_DIGITS = 18
_MOST_ID = 500  # characters; ids stand in many places
MULTIPLE_CHOICE = "multiple-choice"  # `question_type` in VLM4D's files and for the release's evaluator
# MLLM4D-Bench: scenario, as curation names it -> subtask
SUBTASKS: Mapping[str, str] = {
    "camera_absolute_distance": "camera_absolute_distance",
    "camera_relative_direction": "camera_relative_direction",
    "object_absolute_distance": "object_absolute_distance",
    "object_camera_absolute_distance": "object_camera_absolute_distance",
    "object_camera_relative_distance": "object_camera_relative_distance",
    "object_camera_relative_direction": "object_camera_relative_direction",
    "object_camera_lateral_direction": "object_camera_relative_direction",
    "object_camera_longitudinal_direction": "object_camera_relative_direction",
}
_VLM4D_PATH = re.compile(r"(?:^|[/\\])(videos_(real|synthetic))[/\\](.+)$")


@dataclass(frozen=True)
class AskedQuestion:
    """What a question of a benchmark is, and by what its answer is judged.

    Attributes:
      id: unique in the benchmark.
      benchmark: "vlm4d", "mllm4d" or "jsonl".
      split: "real", "synthetic", "bench", or the file's name without suffix.
      category, subtask: what tables are grouped by; None = the benchmark has no such thing.
      video: the path as the benchmark names it; questions with the same one are not independent.
      media: where that file is, None if no root is given; in predictions with the part that is meant (`named_part`).
      question: the text without options.
      choices: letter -> option text, in the file's order.
      answer: the truth as the file gives it, a letter or an option's text.
      truth: the letters whose option is right.
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


@dataclass(frozen=True)
class BenchmarkQuestion(AskedQuestion):
    """One question as its file has it.

    Attributes:
      prompt: the user's whole text as the file has it, with <video> once; None = to be composed from question and
        choices.
      system: the system message that the file brings; None = it has none.
      span: which part of the video is meant; None = all of it.
    """

    prompt: str | None = None
    system: str | None = None
    span: Span | None = None


# (record, name of its file without suffix, name of the record, folder of the videos or None) -> question
ParseFn = Callable[[Mapping[str, Any], str, str, "str | None"], BenchmarkQuestion]


def vlm4d_question(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> BenchmarkQuestion:
    """Return a VLM4D question: {id, video, question, choices, answer: the text of an option}.

    The split and the file's place under `root` are read off the part of the path from `videos_real/` or
    `videos_synthetic/` on: what is before it is somebody's disk. Ids count within a split, so the split goes in front.
    Real questions are in the category "exocentric" or "egocentric" by their number and in the subtask "numeric" if
    their options are integers, else "text"; synthetic ones are in "false positive" if the answer is that the thing is
    not there, else in "directional".

    Raises:
      RecordError: naming what is wrong.
    """
    name, question, choices = _id(raw, ""), text_field(raw, "question"), _choices(raw.get("choices"))
    found = _VLM4D_PATH.search(text_field(raw, "video"))
    if not found:
        raise RecordError(f"'video' is {shown(raw['video'])}, without videos_real/ or videos_synthetic/ in it")
    folder, split, rest = found[1], found[2], found[3].replace("\\", "/")
    truth, answer = _truth(choices, raw.get("answer")), str(raw.get("answer"))
    if split == "real":
        number = re.search(r"\d+$", name)
        if not number or len(number[0]) > _MOST_DIGITS:
            raise RecordError(
                "its 'id' does not end in a number that a question can have, which says whether it is egocentric"
            )
        category = "exocentric" if int(number[0]) <= VLM4D_LAST_EXOCENTRIC else "egocentric"
        subtask = "numeric" if all(type(option) is int for option in raw["choices"].values()) else "text"
    else:
        said = answer.strip().casefold()
        category, subtask = "false positive" if said == "no" or said.startswith("no ") else "directional", None
    video, media = f"{folder}/{rest}", None
    if root is not None:
        media = resolve_media(root, video if is_folder(os.path.join(root, folder)) else rest)
    named = f"{split}/{name}"
    return BenchmarkQuestion(named, "vlm4d", split, category, subtask, video, media, question, choices, answer, truth)


def bench_question(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> BenchmarkQuestion:
    """Return a question of MLLM4D-Bench: a record with a `question_type` out of `SUBTASKS`, which is its category.

    Where `question_type` is `MULTIPLE_CHOICE`, as curation writes it, `category` has the scenario.

    Raises:
      RecordError: naming what is wrong.
    """
    read, field = record_question(raw, stem, key, root), "question_type"
    if raw.get(field) == MULTIPLE_CHOICE:
        field = "category"
    scenario = raw.get(field)
    if scenario not in SUBTASKS:
        raise RecordError(f"'{field}' must be one of {', '.join(SUBTASKS)}, not {shown(scenario)}")
    return dataclasses.replace(read, benchmark="mllm4d", split="bench", category=scenario, subtask=SUBTASKS[scenario])


def record_question(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> BenchmarkQuestion:
    """Return a question in a released record layout (see `records`), or one with its parts beside it.

    The parts are `question`, `choices` (or `options`) and `answer`; then no conversation is needed. What is missing is
    read off the conversation: question and options as `options.split_question` does, the answer from `solution` or from
    the assistant's reply. `category` and `subtask` are taken over (`question_type` stands in for a missing category).

    Raises:
      RecordError: naming what is wrong.
    """
    video, conversation = one_video(raw), None
    if not LAYOUTS.keys().isdisjoint(raw):
        conversation = read_conversation(raw)
    system, prompt = conversation.question() if conversation else (None, None)
    parts = {"choices": raw["options"]} | dict(raw) if "options" in raw else raw
    if prompt is not None and not {"question", "choices"} <= parts.keys():
        question, written = split_question(without_placeholders(prompt))
        parts = {"question": question, "choices": written} | dict(parts)
    choices, answer = _choices(parts.get("choices")), _answer(raw, conversation)
    category, subtask, scenario = (
        None if raw.get(field) is None else text_field(raw, field) for field in ("category", "subtask", "question_type")
    )
    return BenchmarkQuestion(
        id=_id(raw, key),
        benchmark="jsonl",
        split=stem,
        category=category or scenario,
        subtask=subtask,
        video=video,
        media=None if root is None else resolve_media(root, video),
        question=text_field(parts, "question").strip(),
        choices=choices,
        answer=str(answer),
        truth=_record_truth(choices, answer),
        prompt=prompt,
        system=system,
        span=video_spans(raw, 1)[0],
    )


PARSERS: Mapping[str, ParseFn] = {"vlm4d": vlm4d_question, "mllm4d": bench_question, "jsonl": record_question}


def _id(raw: Mapping[str, Any], key: str) -> str:
    found = key if raw.get("id") is None else raw["id"]
    if not isinstance(found, str | int) or not 0 < len(str(found).strip()) <= _MOST_ID:
        raise RecordError(
            f"'id' must be a text or a whole number, of at most {_MOST_ID} characters, not {shown(found)}"
        )
    check_text(str(found), "'id'")
    return str(found)


def _choices(value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or len(value) < 2:
        raise RecordError(f"'choices' must be an object with two options or more, not {shown(value)}")
    for letter, option in value.items():
        if len(letter) != 1 or letter not in string.ascii_uppercase:
            raise RecordError(f"'choices' must have capital letters as keys, not {shown(letter)}")
        usable = isinstance(option, str | int | float) and not isinstance(option, bool)
        if not usable or not str(option).strip():
            raise RecordError(f"option {letter} must be a text or a number, not {shown(option)}")
        check_text(str(option), f"option {letter}")
    return MappingProxyType({letter: str(option) for letter, option in value.items()})


def _truth(choices: Mapping[str, str], answer: Any) -> tuple[str, ...]:
    truth = true_letters(choices, answer)
    if not truth:
        answer_said = shown(answer)
        raise RecordError(f"'answer' is {answer_said}, which is none of the options {shown(dict(choices))}")
    return truth


def _record_truth(choices: Mapping[str, str], answer: Any) -> tuple[str, ...]:
    """Return the right letters for an answer given as a letter, as `A. text`, or as the text of an option."""
    letter, text = split_label(str(answer)) or ("", "")
    if letter in choices and (not text or same_option(text) == same_option(choices[letter])):
        answer = choices[letter]
    return _truth(choices, answer)


def _answer(raw: Mapping[str, Any], conversation: Conversation | None) -> Any:
    if raw.get("answer") is not None:
        return raw["answer"]
    if raw.get("solution") is not None and (answer := solution_fields(raw["solution"]).get("answer")) is not None:
        return answer
    last = conversation.turns[-1] if conversation else {"role": "user"}
    if last["role"] != "assistant":
        raise RecordError("there is no 'answer', no 'solution' and no turn of the assistant that gives it")
    return answer_part(last["content"])
