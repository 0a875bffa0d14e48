"""One answer of a model, made from a line of completions.jsonl or of predictions.jsonl, ready to be shown.

Whatever a field holds, it becomes text or is left out: a line that is odd must not cost the page of all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm4d_jax.files.jsonl import Row
from mllm4d_jax.files.quoting import cut
from mllm4d_jax.qa.options import split_label
from mllm4d_jax.qa.reasoning import MAX_METRES
from mllm4d_jax.report.reading import MOST_NAME, number, outcome_of_prediction, text

Vec3 = tuple[float, float, float]
MAX_STATES = 16  # centres of one kind that are drawn; a question has two
MAX_PARTS = 40  # options of a question and components of a reward that are shown

TONES = {"correct": "good", "wrong": "bad", "unparsed": "warn", "not judged": ""}


@dataclass(frozen=True)
class Centers:
    """Positions in metres in the order of the states (start, end); None where a state has none."""

    truth: tuple[Vec3 | None, ...] = ()
    predicted: tuple[Vec3 | None, ...] = ()


@dataclass(frozen=True)
class ShownAnswer:
    """A question, what the model said, and what came of it.

    Attributes:
      title: heading.
      question: as the model got it.
      media: files of the clip, as the run resolved them.
      choices: letter -> text, where the line has them.
      response: raw text.
      outcome: a key of `TONES`.
      answer: what was extracted; '' for nothing.
      truth: letters (or text) of the right answer.
      scores: reward components and what follows from them.
      facts: (name, value) pairs to be shown.
      facets: name -> value to choose by; keys: name -> number to sort by.
      camera, objects: centres.
    """

    title: str
    question: str
    media: tuple[str, ...]
    choices: Mapping[str, str]
    response: str
    outcome: str
    answer: str
    truth: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    facts: tuple[tuple[str, str], ...] = ()
    facets: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, float] = field(default_factory=dict)
    camera: Centers = Centers()
    objects: Centers = Centers()


def completion_item(row: Row) -> ShownAnswer:
    """A line of completions.jsonl."""
    solution = row["solution"] if isinstance(row.get("solution"), Mapping) else {}
    rewards = row["rewards"] if isinstance(row.get("rewards"), Mapping) else {}
    scores = {cut(name, MOST_NAME): number(value) for name, value in list(rewards.items())[:MAX_PARTS]}
    scores = _finite(scores | {name: number(row.get(name)) for name in ("total", "advantage")})
    answer, truth, outcome = text(row.get("answer")), text(solution.get("answer")), "not judged"
    truth = (split_label(truth) or (truth,))[0]  # as the rewards read it: the letter of "A. left"
    if not answer:
        outcome = "unparsed"
    elif truth:
        outcome = "correct" if answer == truth else "wrong"
    step, branch = text(row.get("step")), text(row.get("branch"))
    named = (("step", step), ("", text(row.get("key"))), ("branch", branch))
    keys = {"step": number(row.get("step")), "tokens": number(row.get("tokens")), **scores}
    return ShownAnswer(
        title=", ".join(f"{name} {value}".strip() for name, value in named if value) or "completion",
        question=text(row.get("question")),
        media=_paths(row.get("media")),
        choices={},
        response=text(row.get("completion")),
        outcome=outcome,
        answer=answer,
        truth=(truth,) if truth else (),
        scores=scores,
        facts=_facts(row, ("finish", "tokens", "subtask", "category")),
        facets=_facets(row, outcome, ("finish", "subtask", "category")),
        keys=_finite(keys),
        camera=Centers(_states(solution.get("camera_center")), _states(row.get("camera"))),
        objects=Centers(_states(solution.get("object_center")), _states(row.get("object"))),
    )


def prediction_item(row: Row) -> ShownAnswer:
    """A line of predictions.jsonl."""
    choices = row["choices"] if isinstance(row.get("choices"), Mapping) else {}
    truth = row["truth"] if row.get("truth") and isinstance(row["truth"], list) else [row.get("answer")]
    outcome = outcome_of_prediction(row)
    shown = ("subtask", "category", "benchmark", "split", "rule", "finish", "tokens", "prompt_mode", "control", "video")
    shown += ("version",)
    conflict = (("conflict", "several answers are given"),) if row.get("conflict") is True else ()
    return ShownAnswer(
        title=text(row.get("id")) or "prediction",
        question=text(row.get("question")),
        media=_paths(row.get("media")),
        choices={letter: text(choices[letter]) for letter in sorted(choices)[:MAX_PARTS]},
        response=text(row.get("response")),
        outcome=outcome,
        answer=text(row.get("letter")) or text(row.get("number")),
        truth=tuple(text(value) for value in truth if text(value)),
        facts=_facts(row, shown) + conflict,
        facets=_facets(row, outcome, ("benchmark", "split", "category", "subtask", "finish", "rule", "control")),
        keys=_finite({"tokens": number(row.get("tokens")), "score": number(row.get("score"))}),
    )


def _paths(value: Any) -> tuple[str, ...]:
    found = value if isinstance(value, list) else [value]
    return tuple(path for path in found if isinstance(path, str) and path)


def _facts(row: Row, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name.replace("_", " "), text(row[name])) for name in names if text(row.get(name)))


def _facets(row: Row, outcome: str, names: Sequence[str]) -> dict[str, str]:
    return {"outcome": outcome, **{name: text(row[name]) for name in names if text(row.get(name))}}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _states(value: Any) -> tuple[Vec3 | None, ...]:
    """Centres of a solution or a completion; a single [x, y, z] counts as one state, what is malformed as None."""
    if not isinstance(value, list):
        return ()
    return tuple(map(_point, [value] if _point(value) else value[:MAX_STATES]))


def _point(value: Any) -> Vec3 | None:
    if not isinstance(value, list) or len(value) != 3:
        return None
    found = tuple(map(number, value))
    return found if all(abs(metres) <= MAX_METRES for metres in found) else None  # NaN is neither
