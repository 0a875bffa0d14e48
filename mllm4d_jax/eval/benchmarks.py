"""The questions of a benchmark, whatever file they come from, as `Item`s.

- `vlm4d`: the VLM4D lists (real and synthetic), with or without published responses in them;
- `mllm4d`: held-out questions in the six subtasks of MLLM4D-Bench, as curation writes them (`bench.json`) or in one of
  the released record layouts with a `question_type`;
- `jsonl`: any questions in those layouts.

Files are JSON lists or JSONL. All broken questions of all files are reported together.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.qa.answers import same_option, true_letters
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_path import resolve_media
from mllm4d_jax.qa.records import ROLES

# The published id of the last question about a video that was filmed from outside; later ones are egocentric.
VLM4D_LAST_EXOCENTRIC = 922
# MLLM4D-Bench: scenario, as curation names it -> subtask
SUBTASKS: Mapping[str, str] = MappingProxyType(
    {
        "camera_absolute_distance": "camera_absolute_distance",
        "camera_relative_direction": "camera_relative_direction",
        "object_absolute_distance": "object_absolute_distance",
        "object_camera_absolute_distance": "object_camera_absolute_distance",
        "object_camera_relative_distance": "object_camera_relative_distance",
        "object_camera_lateral_direction": "object_camera_relative_direction",
        "object_camera_longitudinal_direction": "object_camera_relative_direction",
        "object_camera_relative_direction": "object_camera_relative_direction",
    }
)
_VLM4D_PATH = re.compile(r"(?:^|[/\\])(videos_(real|synthetic))[/\\](.+)$")
_OPTION_LINE = re.compile(r"\s*\(?([A-Z])[.):]\s*(.*\S)\s*$")
_MAX_SHOWN = 20


class BenchmarkError(ValueError):
    """Question files that cannot be used; names every file and question that is wrong."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      id: unique in the benchmark.
      benchmark: "vlm4d", "mllm4d" or "jsonl".
      split: "real", "synthetic", "bench", or the file's name without suffix.
      category, subtask: what tables are grouped by; None = the benchmark has no such thing.
      video: the path as the benchmark names it; questions with the same one are not independent.
      media: where that file is, None if no root is given.
      question: the text without options.
      choices: letter -> option text, in the file's order.
      answer: the truth as the file gives it, a letter or an option's text.
      truth: the letters whose option is right.
      prompt: the user's whole text as the file has it, without placeholders; None = to be composed from question and
        choices.
      system: the system message that the file brings; None = it has none.
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
    prompt: str | None = None
    system: str | None = None


ParseFn = Callable[[Mapping[str, Any], str, str, "str | None"], Item]


def vlm4d_item(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> Item:
    """A VLM4D question: {id, video, question, choices, answer: the text of an option}.

    The split and the file's place under `root` are read off the part of the path from `videos_real/` or
    `videos_synthetic/` on: what is before it is somebody's disk. Ids count within a split, so the split goes in front.
    Real questions are in the category "exocentric" or "egocentric" by their number and in the subtask "numeric" if
    their options are integers, else "text"; synthetic ones are in "false positive" if the answer is that the thing is
    not there, else in "directional".

    Raises:
      RecordError: naming what is wrong.
    """
    del stem
    name, question, choices = _text(raw, "id"), _text(raw, "question"), _choices(raw.get("choices"))
    found = _VLM4D_PATH.search(_text(raw, "video"))
    if not found:
        raise RecordError(f"'video' is {raw['video']!r}, without videos_real/ or videos_synthetic/ in it")
    folder, split, rest = found[1], found[2], found[3].replace("\\", "/")
    truth = _truth(choices, raw.get("answer"), is_letter=False)
    if split == "real":
        number = re.search(r"\d+$", name)
        if not number:
            raise RecordError("its 'id' does not end in a number, which says whether it is egocentric")
        category = "exocentric" if int(number[0]) <= VLM4D_LAST_EXOCENTRIC else "egocentric"
        subtask = "numeric" if all(type(option) is int for option in raw["choices"].values()) else "text"
    else:
        said = str(raw["answer"]).strip().casefold()
        category, subtask = "false positive" if said == "no" or said.startswith("no ") else "directional", None
    media = None
    if root is not None:
        media = resolve_media(root, f"{folder}/{rest}" if (Path(root) / folder).is_dir() else rest)
    video = f"{folder}/{rest}"
    answer = str(raw["answer"])
    return Item(f"{split}/{name}", "vlm4d", split, category, subtask, video, media, question, choices, answer, truth)


def bench_item(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> Item:
    """A question of MLLM4D-Bench: a record with a `question_type` out of `SUBTASKS`; the scenario is its category.

    Raises:
      RecordError: naming what is wrong.
    """
    item, scenario = record_item(raw, stem, key, root), raw.get("question_type")
    if scenario not in SUBTASKS:
        raise RecordError(f"'question_type' must be one of {', '.join(SUBTASKS)}, not {scenario!r}")
    return dataclasses.replace(item, benchmark="mllm4d", split="bench", category=scenario, subtask=SUBTASKS[scenario])


def record_item(raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> Item:
    """A question in a released record layout (conversations or messages), or one with its parts beside it.

    The parts are `question`, `choices` (or `options`) and `answer`. What is missing is read off the conversation: the
    options from the lines `A. text` of the user's text, the answer from `solution` or the last turn of the assistant.
    `category` and `subtask` are taken over (`question_type` stands in for a missing category).

    Raises:
      RecordError: naming what is wrong.
    """
    turns = _turns(raw)
    asked = [text for role, text in turns if role == "user"]
    if len(asked) > 1:
        raise RecordError(f"it has {len(asked)} turns of the user; a question to be scored is one turn")
    prompt = re.sub("<(?:video|image)>", "", asked[0]).strip() if asked else None
    if "choices" in raw or "options" in raw:
        choices = _choices(raw.get("choices", raw.get("options")))
    else:
        choices = _choices(_written_choices(prompt or ""))
    if isinstance(raw.get("question"), str):
        question = raw["question"]
    else:
        question = (prompt or "").partition("\nOptions:")[0].strip()
    if not question.strip():
        raise RecordError("there is no 'question', and no user's turn to take it from")
    answer = _answer(raw, turns)
    truth = _record_truth(choices, answer)
    named = {name: raw.get(name) for name in ("category", "subtask", "question_type")}
    for name, value in named.items():
        if value is not None and not isinstance(value, str):
            raise RecordError(f"'{name}' must be a text, not {value!r}")
    video = _video(raw)
    return Item(
        id=str(raw.get("id", key)),
        benchmark="jsonl",
        split=stem,
        category=named["category"] or named["question_type"],
        subtask=named["subtask"],
        video=video,
        media=None if root is None else resolve_media(root, video),
        question=question.strip(),
        choices=choices,
        answer=str(answer),
        truth=truth,
        prompt=prompt,
        system=next((text for role, text in turns if role == "system"), None),
    )


PARSERS: Mapping[str, ParseFn] = MappingProxyType({"vlm4d": vlm4d_item, "mllm4d": bench_item, "jsonl": record_item})


def question_files(path: str | Path) -> tuple[Path, ...]:
    """A file itself; of a folder all .json and .jsonl files, by name. Raises BenchmarkError if there is none."""
    path = Path(path)
    if path.is_file():
        return (path,)
    found = tuple(sorted(p for p in path.glob("*.json*") if p.suffix in (".json", ".jsonl"))) if path.is_dir() else ()
    if not found:
        raise BenchmarkError(f"{path}: no such file, and no folder with .json or .jsonl files")
    return found


def read_items(benchmark: str, files: Iterable[Path], root: str | None) -> Iterator[tuple[Item, Mapping[str, Any]]]:
    """(question, its record as the file has it) one by one, in the order of the files.

    Args:
      benchmark: key of `PARSERS`.
      root: folder of the videos, which must then exist; None = videos are not needed.

    Raises:
      BenchmarkError: after the last question, if any was wrong: all of them, with file, number and id. Also for an
        id that occurs twice.
      RecordFileError: a file that is missing, or neither a JSON list nor JSONL.
    """
    if benchmark not in PARSERS:
        raise BenchmarkError(f"benchmark must be one of {', '.join(PARSERS)}, not {benchmark!r}")
    problems, seen = [], {}
    for path in files:
        source = RecordFile(path, root or "")
        for n in range(len(source)):
            key = source.key(n)
            try:
                raw = source.raw(n)
                item = _parsed(PARSERS[benchmark], raw, path.stem, key, root)
                if item.id in seen:
                    raise RecordError(f"the id {item.id!r} is also that of {seen[item.id]}", key=key)
            except RecordError as error:
                problems.append(str(error))
                continue
            seen[item.id] = key
            yield item, raw
    if problems:
        more = f"\nand {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        listed = "\n".join(problems[:_MAX_SHOWN])
        raise BenchmarkError(f"{len(problems)} of {len(problems) + len(seen)} questions are unusable:\n{listed}{more}")


def load_items(benchmark: str, path: str | Path, root: str | None) -> tuple[Item, ...]:
    """All questions of a file or folder. Arguments and errors: see `read_items`."""
    return tuple(item for item, _ in read_items(benchmark, question_files(path), root))


def _parsed(parse: ParseFn, raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> Item:
    """The parser's result; its errors name the question by key and id, and a video must exist."""
    named = f"{key} (id {raw['id']!r})" if isinstance(raw.get("id"), str) else key
    try:
        item = parse(raw, stem, key, root)
    except RecordError as error:
        raise type(error)(error.message, error.reason, named) from None
    if item.media is not None and not Path(item.media).is_file():
        raise RecordError(f"there is no video {item.media}; data.root must be the folder it is in", key=named)
    return item


def _text(raw: Mapping[str, Any], field: str) -> str:
    value = raw.get(field)
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"'{field}' must be a text that is not empty, not {value!r}")
    return value


def _choices(value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or len(value) < 2:
        raise RecordError(f"'choices' must be an object with two options or more, not {value!r}")
    for letter, option in value.items():
        if len(letter) != 1 or letter not in string.ascii_uppercase:
            raise RecordError(f"'choices' must have capital letters as keys, not {letter!r}")
        usable = isinstance(option, str | int | float) and not isinstance(option, bool)
        if not usable or not str(option).strip():
            raise RecordError(f"option {letter} must be a text or a number, not {option!r}")
    return MappingProxyType({letter: str(option) for letter, option in value.items()})


def _truth(choices: Mapping[str, str], answer: Any, *, is_letter: bool) -> tuple[str, ...]:
    truth = true_letters(choices, answer, is_letter=is_letter)
    if not truth:
        raise RecordError(f"'answer' is {answer!r}, which is none of the options {dict(choices)}")
    return truth


def _record_truth(choices: Mapping[str, str], answer: Any) -> tuple[str, ...]:
    """The right letters for an answer given as a letter, as `A. text`, or as the text of an option."""
    said = str(answer).strip()
    bare, line = re.fullmatch(r"\(?([A-Z])[.):]?", said), _OPTION_LINE.match(said)
    if bare and bare[1] in choices:
        return _truth(choices, bare[1], is_letter=True)
    if line and same_option(line[2]) == same_option(choices.get(line[1], "")):
        return _truth(choices, line[1], is_letter=True)
    return _truth(choices, answer, is_letter=False)


def _turns(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    who, what, turns = (
        ("from", "value", raw.get("conversations"))
        if "conversations" in raw
        else (
            "role",
            "content",
            raw.get("messages", []),
        )
    )
    if not isinstance(turns, list):
        raise RecordError("'conversations' or 'messages' must be a list of turns")
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get(who) not in ROLES or not isinstance(turn.get(what), str):
            raise RecordError(f"a turn must have '{who}', one of {', '.join(ROLES)}, and a text '{what}', not {turn!r}")
        found.append((ROLES[turn[who]], turn[what]))
    return found


def _written_choices(prompt: str) -> dict[str, str]:
    """The options written out in a prompt: its lines `A. text`, from the last `Options:` on if there is one."""
    lines = prompt.rpartition("Options:")[2].splitlines()
    found = [match for match in map(_OPTION_LINE.match, lines) if match]
    letters = [match[1] for match in found]
    if letters != list(string.ascii_uppercase[: len(letters)]):
        raise RecordError(f"the options written in the question have the letters {letters}, not A, B, ... in order")
    return {match[1]: match[2] for match in found}


def _answer(raw: Mapping[str, Any], turns: list[tuple[str, str]]) -> Any:
    if raw.get("answer") is not None:
        return raw["answer"]
    solution = raw.get("solution")
    if isinstance(solution, list) and len(solution) == 1:
        solution = solution[0]
    if isinstance(solution, Mapping) and solution.get("answer") is not None:
        return solution["answer"]
    if turns and turns[-1][0] == "assistant":
        found = re.findall(r"<answer>([^<]*)</answer>", turns[-1][1])
        return found[-1].strip() if found else turns[-1][1].strip()
    raise RecordError("there is no 'answer', no 'solution' and no turn of the assistant that gives it")


def _video(raw: Mapping[str, Any]) -> str:
    """The record's one video."""
    value = raw.get("video") or raw.get("videos")
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"'video' must be the path of one video, not {value!r}")
    if raw.get("image") or raw.get("images"):
        raise RecordError("it has images; a question to be scored is about one video")
    return value
