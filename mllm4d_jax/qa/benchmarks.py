"""Parsers of benchmarks: a record of one of their files -> a question.

- `vlm4d`: the VLM4D lists (real and synthetic), with or without published responses in them;
- `mllm4d`: held-out questions in the six subtasks of MLLM4D-Bench, as curation writes them (`bench.json`) or in one of
  the released record layouts with a `question_type`;
- `jsonl`: any questions in those layouts;
- `vsi`, `sti`, `dsr`, `mmsi_video`: see `spatial_benchmarks`.

A new benchmark is a function here or beside it, its name in `PARSERS` and in the choices of the config key `benchmark`;
if it comes with a program that reads answers, its rule is in `published_rules`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import is_folder
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import resolve_media
from mllm4d_jax.qa.options import split_question
from mllm4d_jax.qa.questions import (
    BenchmarkQuestion,
    ParseFn,
    answer_letters,
    letters_of,
    option_texts,
    question_id,
)
from mllm4d_jax.qa.reasoning import answer_part
from mllm4d_jax.qa.records import (
    LAYOUTS,
    Conversation,
    fields_of,
    one_video,
    read_conversation,
    text_field,
    video_spans,
    without_placeholders,
)
from mllm4d_jax.qa.rewards import solution_fields
from mllm4d_jax.qa.spatial_benchmarks import dsr_question, mmsi_video_question, sti_question, vsi_question

# The published id of the last question about a video that was filmed from outside; later ones are egocentric.
VLM4D_LAST_EXOCENTRIC = 922
_MOST_DIGITS = 18
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
    name, question, choices = question_id(raw, ""), text_field(raw, "question"), option_texts(raw.get("choices"))
    found = _VLM4D_PATH.search(text_field(raw, "video"))
    if not found:
        raise RecordError(f"'video' is {shown(raw['video'])}, without videos_real/ or videos_synthetic/ in it")
    folder, split, rest = found[1], found[2], found[3].replace("\\", "/")
    truth, answer = letters_of(choices, raw.get("answer")), str(raw.get("answer"))
    if split == "real":
        number = re.search(r"\d+$", name)
        if not number or len(number[0]) > _MOST_DIGITS:
            raise RecordError(
                "its 'id' does not end in a number that a question can have, which says whether it is egocentric"
            )
        category = "exocentric" if int(number[0]) <= VLM4D_LAST_EXOCENTRIC else "egocentric"
        subtask = "numeric" if all(type(option) is int for option in fields_of(raw["choices"]).values()) else "text"
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
    raw, conversation = fields_of(raw), None
    video = one_video(raw)
    if not LAYOUTS.keys().isdisjoint(raw):
        conversation = read_conversation(raw)
    system, prompt = conversation.question() if conversation else (None, None)
    parts = {"choices": raw["options"]} | raw if "options" in raw else raw
    if prompt is not None and not {"question", "choices"} <= parts.keys():
        question, written = split_question(without_placeholders(prompt))
        parts = {"question": question, "choices": written} | parts
    choices, answer = option_texts(parts.get("choices")), _answer(raw, conversation)
    category, subtask, scenario = (
        None if raw.get(field) is None else text_field(raw, field) for field in ("category", "subtask", "question_type")
    )
    return BenchmarkQuestion(
        id=question_id(raw, key),
        benchmark="jsonl",
        split=stem,
        category=category or scenario,
        subtask=subtask,
        video=video,
        media=None if root is None else resolve_media(root, video),
        question=text_field(parts, "question").strip(),
        choices=choices,
        answer=str(answer),
        truth=answer_letters(choices, answer),
        prompt=prompt,
        system=system,
        span=video_spans(raw, 1)[0],
    )


PARSERS: Mapping[str, ParseFn] = {
    "vlm4d": vlm4d_question,
    "mllm4d": bench_question,
    "jsonl": record_question,
    "vsi": vsi_question,
    "sti": sti_question,
    "dsr": dsr_question,
    "mmsi_video": mmsi_video_question,
}


def _answer(raw: Mapping[str, Any], conversation: Conversation | None) -> Any:
    if raw.get("answer") is not None:
        return raw["answer"]
    if raw.get("solution") is not None and (answer := solution_fields(raw["solution"]).get("answer")) is not None:
        return answer
    last = conversation.turns[-1] if conversation else {"role": "user"}
    if last["role"] != "assistant":
        raise RecordError("there is no 'answer', no 'solution' and no turn of the assistant that gives it")
    return answer_part(last["content"])
