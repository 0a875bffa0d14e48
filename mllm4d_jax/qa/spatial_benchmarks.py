"""Parsers of public benchmarks of spatial reasoning, in the forms that their authors and VLMEvalKit publish.

- `vsi`: VSI-Bench (arXiv 2412.14171), rows of nyu-visionx/VSI-Bench;
- `sti`: STI-Bench (arXiv 2503.23765), rows of MINT-SJTU/STI-Bench, qa.parquet;
- `dsr`: DSR-Bench (arXiv 2512.20557), rows of TencentARC/DSR_Suite-Data, benchmark.parquet;
- `mmsi_video`: MMSI-Video-Bench (arXiv 2512.10863), entries of rbler/MMSI-Video-Bench, mmsivideo.json.

Rows of VLMEvalKit's tables of the first three have other names for some fields (`index`, `video`, `candidates` or
`options`, `answer`, `task_type`) and are read as well. Prompts are those of the benchmarks' own programs; asked for
reasoning, a question goes without the request for nothing but the letter.
"""

from __future__ import annotations

import ast
import json
import math
import string
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mllm4d_jax.files.quoting import shown
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import resolve_media
from mllm4d_jax.qa.options import lettered, split_label
from mllm4d_jax.qa.questions import BenchmarkQuestion, answer_letters, option_texts, question_id
from mllm4d_jax.qa.reasoning import parse_number
from mllm4d_jax.qa.records import check_text, text_field

# VSI-Bench: question type -> task. The score is the mean over the tasks, and of a task that over its types.
VSI_CHOICE_TASKS: Mapping[str, str] = {
    "object_rel_direction_easy": "object_rel_direction",
    "object_rel_direction_medium": "object_rel_direction",
    "object_rel_direction_hard": "object_rel_direction",
    "object_rel_distance": "object_rel_distance",
    "route_planning": "route_planning",
    "obj_appearance_order": "obj_appearance_order",
}
VSI_NUMBER_TASKS = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
_VSI_INTRODUCTION = "These are frames of a video."
_VSI_LETTER = "Answer with the option's letter from the given choices directly."
_VSI_NUMBER = "Please answer the question using a single word or phrase."
_STI_LETTER = "Please output only the option letter!"
_DSR_INTRODUCTION = (
    "These are the frames of a video. Select the best answer to the following multiple-choice question based on the "
    "video."
)
_DSR_LETTER = "Respond with only the letter (A, B, C, or D) of the correct option."
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
_STI_TEXTS = (("Video", "video"), ("Question", "question"))
_MOST_LIST = 100_000  # characters of a list that is written as a text
_MMSI_PROMPT = ("system_prompt", "task_prompt", "user_prompt", "format_prompt")


def vsi_question(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> BenchmarkQuestion:
    """Return a question of VSI-Bench: {dataset, scene_name, question_type, question, ground_truth, options}.

    The category is the question type, the subtask its task. Raises RecordError naming what is wrong.
    """
    kind, question = text_field(raw, "question_type"), _asked(raw, "question")
    if kind not in VSI_CHOICE_TASKS and kind not in VSI_NUMBER_TASKS:
        known = ", ".join((*VSI_CHOICE_TASKS, *VSI_NUMBER_TASKS))
        raise RecordError(f"'question_type' must be one of {known}, not {shown(kind)}")
    video = text_field(raw, "video") if _is_given(raw.get("video")) else _vsi_video(raw)
    answer, asked = _first(raw, "ground_truth", "answer"), f"<video>\n{_VSI_INTRODUCTION}\n{question}"
    if kind in VSI_NUMBER_TASKS:
        found = {"choices": {}, "truth": (), "true_number": _true_number(answer), "prompt": asked}
        request = _VSI_NUMBER
    else:
        options = _listed(_first(raw, "options", "candidates"), "options")
        choices = _choices_of(options)
        asked += "\nOptions:\n" + "\n".join(map(str, options))
        found = {"choices": choices, "truth": answer_letters(choices, answer), "prompt": asked}
        request = _VSI_LETTER
    return BenchmarkQuestion(
        id=_id(raw, key),
        benchmark="vsi",
        split="test",
        category=kind,
        subtask=VSI_CHOICE_TASKS.get(kind, kind),
        video=video,
        media=None if root is None else resolve_media(root, video),
        question=question,
        answer=str(answer),
        direct_prompt=f"{asked}\n{request}",
        **found,
    )


def sti_question(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> BenchmarkQuestion:
    """Return a question of STI-Bench: {Video, ID, time_start, time_end, Question, Candidates, Answer, Task}.

    The whole video is shown, the text says which seconds are meant. The category is the task, the subtask the kind of
    scene: of the field `Scene`, or as the benchmark's program tells it from the video's name. Raises RecordError naming
    what is wrong.
    """
    video, question = (_asked({name: _first(raw, upper, name)}, name) for upper, name in _STI_TEXTS)
    start, end = (_seconds(raw, name) for name in ("time_start", "time_end"))
    candidates = _first(raw, "Candidates", "options", "candidates")
    if isinstance(candidates, str):
        candidates = _written(candidates, "Candidates")
    if isinstance(candidates, Mapping):
        choices = option_texts(candidates)
    else:
        choices = _choices_of(_listed(candidates, "Candidates"))
    answer, name = _first(raw, "Answer", "answer"), _first(raw, "Scene", "scene")
    written = "\n".join(f"({letter}) {text}" for letter, text in choices.items())
    asked = f"<video>\nFrom {start} s to {end} s. {question}\n{written}"
    return BenchmarkQuestion(
        id=_id(raw, key),  # `ID` counts within something that the rows do not say
        benchmark="sti",
        split="test",
        category=text_field({"Task": _first(raw, "Task", "task_type")}, "Task"),
        subtask=_sti_scene(video) if name is None else text_field({"Scene": name}, "Scene").lower(),
        video=video,
        media=None if root is None else resolve_media(root, video),
        question=question,
        choices=choices,
        answer=str(answer),
        truth=answer_letters(choices, answer),
        prompt=asked,
        direct_prompt=f"{asked}\n{_STI_LETTER}",
    )


def dsr_question(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> BenchmarkQuestion:
    """Return a question of DSR-Bench: {videoID, type, question, options, answer}; the category is the type.

    A video's name without a suffix is that of an .mp4 file. Raises RecordError naming what is wrong.
    """
    question, options = _asked(raw, "question"), _listed(_first(raw, "options", "candidates"), "options")
    video = text_field({"videoID": _first(raw, "videoID", "video")}, "videoID")
    if PurePath(video).suffix.lower() not in _VIDEO_SUFFIXES:
        video += ".mp4"
    choices, answer = _choices_of(options), _first(raw, "answer")
    asked = f"<video>\nQuestion: {question}\n" + "\n".join(map(str, options))
    return BenchmarkQuestion(
        id=_id(raw, key),
        benchmark="dsr",
        split="test",
        category=text_field({"type": _first(raw, "type", "task_type")}, "type"),
        subtask=None,
        video=video,
        media=None if root is None else resolve_media(root, video),
        question=question,
        choices=choices,
        answer=str(answer),
        truth=answer_letters(choices, answer),
        prompt=f"{_DSR_INTRODUCTION}\n{asked}",
        direct_prompt=f"{_DSR_INTRODUCTION} {_DSR_LETTER}\n{asked}\nAnswer:",
    )


def mmsi_video_question(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> BenchmarkQuestion:
    """Return a question of MMSI-Video-Bench: clips below `videos/`, images below `ref_images/`, and a text in four
    fields with a placeholder for each of them. The category is its `type`.

    Raises RecordError naming what is wrong.
    """
    clips = [text_field(clip, "path") for clip in _entries(raw.get("video_list"), "video_list")]
    images = [image for image in _listed(raw.get("ref_images") or [], "ref_images")]
    named = {"video": [f"videos/{path}" for path in clips], "image": [f"ref_images/{path}" for path in images]}
    system, task, user, form = (text_field(raw, name, "") for name in _MMSI_PROMPT)
    prompt, plain = f"{system}\n{task}{user}{form}", f"{system}\n{task}{user}"
    for kind, files in named.items():
        if prompt.count(f"<{kind}>") != len(files) or plain.count(f"<{kind}>") != len(files):
            raise RecordError(f"the prompts have {prompt.count(f'<{kind}>')} <{kind}> for {len(files)} file(s)")
    choices, answer = _choices_of(_listed(raw.get("options"), "options")), _first(raw, "ground_truth")
    paths = None
    if root is not None:
        paths = {kind: tuple(resolve_media(root, file) for file in files) for kind, files in named.items()}
    return BenchmarkQuestion(
        id=question_id(raw, key),
        benchmark="mmsi_video",
        split="test",
        category=text_field(raw, "type"),
        subtask=None,
        video=clips[0],
        media=paths and paths["video"][0],
        question=text_field(raw, "ori_question", user.strip()),
        choices=choices,
        answer=str(answer),
        truth=answer_letters(choices, answer),
        prompt=plain,
        direct_prompt=prompt,
        files=paths,
    )


def _id(raw: Mapping[str, Any], key: str) -> str:
    return question_id({"id": _first(raw, "id", "index")}, key)


def _asked(raw: Mapping[str, Any], field: str) -> str:
    """A text that goes into a prompt, where a placeholder would stand for a file."""
    text = text_field(raw, field).strip()
    if "<video>" in text or "<image>" in text:
        raise RecordError(f"'{field}' holds a placeholder for a file, which only the prompt may: {shown(text)}")
    return text


def _is_given(value: Any) -> bool:
    """Whether a cell of a table holds anything; NaN is how pandas writes an empty one."""
    return not (value is None or value == "" or isinstance(value, float) and math.isnan(value))


def _first(raw: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these fields that is there; None for none."""
    return next((raw[name] for name in names if _is_given(raw.get(name))), None)


def _vsi_video(raw: Mapping[str, Any]) -> str:
    return f"{text_field(raw, 'dataset')}/{text_field(raw, 'scene_name')}.mp4"


def _true_number(answer: Any) -> float:
    value = parse_number(str(answer).strip())
    if value is None or not value > 0:
        raise RecordError(f"'ground_truth' must be a number above 0 for this type of question, not {shown(answer)}")
    return value


def _seconds(raw: Mapping[str, Any], field: str) -> str:
    """Seconds as the row writes them."""
    value = raw.get(field)
    if isinstance(value, bool) or parse_number(str(value).strip()) is None:
        raise RecordError(f"'{field}' must be a number of seconds, not {shown(value)}")
    return str(value).strip()


def _sti_scene(video: str) -> str:
    name = video.rpartition("/")[2]
    if "camera" in name:
        return "outdoor"
    if name.startswith("scene"):
        return "indoor"
    stem = name.partition(".")[0]
    return "desktop" if stem.isdigit() and len(stem) == 6 else "unknown"


def _written(text: str, field: str) -> Any:
    """The value that a text of a table holds, in JSON or as Python prints lists and objects of plain values."""
    if len(text) > _MOST_LIST:
        raise RecordError(f"'{field}' is a text of {len(text)} characters, too long for a list of options")
    for read in (json.loads, ast.literal_eval):  # neither runs anything
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise RecordError(f"'{field}' must be a list, not {shown(text)}")


def _listed(value: Any, field: str) -> list[Any]:
    found = _written(value, field) if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise RecordError(f"'{field}' must be a list, not {shown(value)}")
    for entry in found:
        if isinstance(entry, str):
            check_text(entry, f"'{field}'")
    return list(found)


def _entries(value: Any, field: str) -> list[Mapping[str, Any]]:
    found = _listed(value, field)
    if not found or not all(isinstance(entry, Mapping) for entry in found):
        raise RecordError(f"'{field}' must be a list of objects with one in it, not {shown(value)}")
    return found


def _choices_of(options: list[Any]) -> Mapping[str, str]:
    """Letter -> text of options written with their letters (`A. text`), or without any."""
    if None in options:  # an option of a list has its letter by its place, so none can be left out
        raise RecordError(f"an option is null: {shown(options)}")
    labelled = [split_label(option) if isinstance(option, str) else None for option in options]
    letters = [found[0] for found in labelled if found and found[1]]
    if letters and letters != list(string.ascii_uppercase[: len(options)]):
        raise RecordError(f"the options have the letters {letters}, not A, B, ... in order: {shown(options)}")
    return option_texts(dict(found for found in labelled if found) if letters else lettered(options))
