"""Reads what a run left in its workdir. Rows are checked for being JSON objects and for nothing else.

A page is made of what there is: a line that cannot be read is counted and left out, and the page says how many. Files
of completions and predictions may be larger than memory: of them only positions are kept, and what a caller picks of
each line.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm4d_jax.files import jsonl
from mllm4d_jax.files.jsonl import Row
from mllm4d_jax.files.mirror import copied_logs
from mllm4d_jax.files.quoting import cut
from mllm4d_jax.files.remote import is_folder, is_remote

CONFIG, FACTS, METRICS, EVALS, RESULTS = "config.json", "facts.json", "metrics.jsonl", "evals.jsonl", "results.json"
COMPLETIONS, PREDICTIONS, QUARANTINE = "completions.jsonl", "predictions.jsonl", "quarantine.jsonl"
SCORED = "scored.jsonl"  # predictions as the newest scoring read them; shown in their place
SHOWN = (METRICS, EVALS, COMPLETIONS, PREDICTIONS, RESULTS)  # one of them makes a report

MOST_NAME = 100  # characters of the name of a column, a category or a reward
MOST_COLUMNS = 300

Place = tuple[Path, int]  # file and byte at which a line starts


class ReportError(ValueError):
    """There is nothing to make a report of, or it cannot be written."""


@dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      path: the workdir, or a copy of one in a bucket; `home`: what it is called.
      name: its folder's name.
      config: the resolved config, flat: dotted name -> value; {} without one.
      facts: what the run said of itself when it began: name -> text; {} if it said nothing.
      metrics: rows of the training steps, by step, each step once.
      evals: rows of the held-out evaluations, likewise.
      completions, predictions: the places of their lines, repeats left out.
      results: what results.json holds; None without one.
      quarantine: records that could not be used.
      notes: what could not be read, for the reader of the page.
    """

    path: Path
    home: str
    name: str
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    metrics: tuple[Row, ...]
    evals: tuple[Row, ...]
    completions: tuple[CompletionPlace, ...]
    predictions: tuple[PredictionPlace, ...]
    results: Any
    quarantine: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CompletionPlace:
    """Where a completion stands and what it belongs to: its step and its record."""

    place: Place
    step: float
    key: str


@dataclass(frozen=True)
class PredictionPlace:
    """Where a prediction stands, and the fields that are counted. `outcome` is as `outcome_of_prediction` says."""

    place: Place
    id: str
    benchmark: str
    split: str
    category: str
    subtask: str
    outcome: str
    conflict: bool


def read_run(workdir: str | Path) -> Run:
    """Everything a report needs of a workdir.

    Raises:
      ReportError: no such folder, or nothing in it that can be shown.
    """
    if not is_folder(workdir):
        raise ReportError(f"{workdir} is not a folder: name the workdir of a run")
    path = copied_logs(workdir)
    notes: list[str] = []
    metrics, evals = (_by_step(row for _, row in _scan(path / name, notes)) for name in (METRICS, EVALS))
    completions = _distinct(_scan(path / COMPLETIONS, notes), _completion, "step", "key", "branch")
    answers = SCORED if (path / SCORED).is_file() else PREDICTIONS
    predictions = _distinct(_scan(path / answers, notes), _prediction, "id")
    results = _json(path / RESULTS, notes)
    if not (metrics or evals or completions or predictions or results):
        raise ReportError(
            f"{path} holds nothing to report on: none of {', '.join(SHOWN)} is there with anything in it that can be "
            "read" + ("".join(f"; {note}" for note in notes))
        )
    config, facts = (_json(path / name, notes) for name in (CONFIG, FACTS))
    return Run(
        path=path,
        home=str(workdir),
        name=str(workdir).rstrip("/").rpartition("/")[2] if is_remote(workdir) else path.resolve().name,
        config=dict(flat(config)) if isinstance(config, Mapping) else {},
        facts={name: text(value) for name, value in facts.items()} if isinstance(facts, Mapping) else {},
        metrics=metrics,
        evals=evals,
        completions=completions,
        predictions=predictions,
        results=results,
        quarantine=tuple(row for _, row in _scan(path / QUARANTINE, notes)),
        notes=tuple(notes),
    )


def read_at(place: Place) -> Row:
    """The row that stands at a place."""
    path, offset = place
    with path.open("rb") as file:
        file.seek(offset)
        return json.loads(file.readline())


def number(value: Any) -> float:
    """A JSON number as a float; NaN for anything else."""
    if type(value) is float:  # nearly always: long runs ask some millions of times
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def text(value: Any) -> str:
    """Text of a JSON value: strings as they are, null as '', the rest as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def outcome_of_prediction(row: Mapping[str, Any]) -> str:
    """ "unparsed" where no letter or number was found, else "correct" or "wrong" as the evaluation judged it."""
    if not row.get("letter") and row.get("number") is None:
        return "unparsed"
    return "correct" if row.get("correct") is True else "wrong"


def _completion(place: Place, row: Row) -> CompletionPlace:
    return CompletionPlace(place, number(row.get("step")), text(row.get("key")))


def _prediction(place: Place, row: Row) -> PredictionPlace:
    names = (cut(text(row.get(field)), MOST_NAME) for field in ("benchmark", "split", "category", "subtask"))
    conflict = row.get("conflict") is True
    return PredictionPlace(place, text(row.get("id")), *names, outcome_of_prediction(row), conflict)


def _scan(path: Path, notes: list[str]) -> Iterator[tuple[Place, Row]]:
    """Yield the place and the row of every line, all hosts' files; others are counted, but for a half-written last."""
    for file in jsonl.of_all_hosts(path):
        bad = 0
        for line in jsonl.scan(file):
            if line.row is not None:
                yield (file, line.start), line.row
            else:
                bad += line.ended
        if bad:
            notes.append(f"{file.name}: {bad:,} lines are not JSON objects and were left out")


def _by_step(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows with a step, in its order; of a step that a resumed run repeated, the last.

    Columns with a long name are left out, and so are those that come after `MOST_COLUMNS` others.
    """
    steps = {number(row.get("step")): row for row in rows}
    kept = [steps[step] for step in sorted(step for step in steps if math.isfinite(step))]
    names = dict.fromkeys(name for row in kept for name in row if len(name) <= MOST_NAME)
    shown = frozenset(itertools.islice(names, MOST_COLUMNS))
    return tuple(row if row.keys() <= shown else {n: v for n, v in row.items() if n in shown} for row in kept)


def _distinct(lines: Iterable[tuple[Place, Row]], make: Callable[[Place, Row], Any], *fields: str) -> tuple[Any, ...]:
    """What is made of each line; of lines with the same `fields`, all of them there, the last, where the first was."""
    kept: dict[Any, Any] = {}
    for place, row in lines:
        named = all(row.get(field) is not None for field in fields)
        kept[json.dumps([row[field] for field in fields]) if named else len(kept)] = make(place, row)
    return tuple(kept.values())


def _json(path: Path, notes: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        notes.append(f"{path.name} cannot be read: {problem}")
        return None
