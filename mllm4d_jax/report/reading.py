"""Reads what a run left in its workdir. Rows are checked for being JSON objects and for nothing else.

Runs are killed and files are edited, so a line that cannot be read is counted and left out; the page says how many.
Files of completions and predictions may be larger than memory: of them only positions are kept, and what a caller
picks of each line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, METRICS, EVALS, RESULTS = "config.json", "metrics.jsonl", "evals.jsonl", "results.json"
COMPLETIONS, PREDICTIONS, QUARANTINE = "completions.jsonl", "predictions.jsonl", "quarantine.jsonl"
USABLE = (METRICS, EVALS, COMPLETIONS, PREDICTIONS, RESULTS)  # one of them makes a report

Row = dict[str, Any]
Place = tuple[Path, int]  # file and byte at which a line starts


class ReportError(ValueError):
    """There is nothing to make a report of, or it cannot be written."""


@dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      path: the workdir.
      name: its folder's name.
      config: the resolved config, flat: dotted name -> value; {} without one.
      metrics: rows of the training steps, by step, each step once.
      evals: rows of the held-out evaluations, likewise.
      completions, predictions: the places of their lines, repeats left out.
      results: what results.json holds; None without one.
      quarantine: records that could not be used.
      notes: what could not be read, for the reader of the page.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
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
    path = Path(workdir)
    if not path.is_dir():
        raise ReportError(f"{path} is not a folder: name the workdir of a run")
    notes: list[str] = []
    metrics = _by_step(_rows([path / METRICS], notes))
    evals = _by_step(_rows([path / EVALS], notes))
    completions = _unique(_completion(*found) for found in _scan([path / COMPLETIONS], notes))
    predictions = _unique(_prediction(*found) for found in _scan(shards(path, PREDICTIONS), notes))
    results = _json(path / RESULTS, notes)
    if not (metrics or evals or completions or predictions or results):
        raise ReportError(
            f"{path} holds nothing to report on: none of {', '.join(USABLE)} is there with anything in it that can be "
            "read" + ("".join(f"; {note}" for note in notes))
        )
    config = _json(path / CONFIG, notes)
    return Run(
        path=path,
        name=path.resolve().name,
        config=dict(flat(config)) if isinstance(config, Mapping) else {},
        metrics=metrics,
        evals=evals,
        completions=completions,
        predictions=predictions,
        results=results,
        quarantine=tuple(_rows(shards(path, QUARANTINE, "-"), notes)),
        notes=tuple(notes),
    )


def read_at(place: Place) -> Row:
    """The row that stands at a place."""
    path, offset = place
    with path.open("rb") as file:
        file.seek(offset)
        return json.loads(file.readline())


def shards(path: Path, name: str, mark: str = ".") -> list[Path]:
    """The file `name` and those that further hosts wrote beside it (`name` with a mark and the host's number)."""
    stem, _, suffix = name.partition(".")
    numbered = {}
    for file in path.glob(f"{stem}{mark}*.{suffix}"):
        host = file.name[len(stem) + len(mark) : -len(suffix) - 1]
        if host.isdecimal():
            numbered[int(host)] = file
    return [path / name, *(numbered[n] for n in sorted(numbered))]


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
    """(dotted name, value) of every leaf."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def outcome_of_prediction(row: Mapping[str, Any]) -> str:
    """ "unparsed" where no letter was found, else "correct" or "wrong" as the evaluation judged it."""
    if not row.get("letter"):
        return "unparsed"
    return "correct" if row.get("correct") is True else "wrong"


def _completion(place: Place, row: Row) -> tuple[str | None, CompletionPlace]:
    """(identity, value) of a line of completions."""
    return _identity(row, "step", "key", "branch"), CompletionPlace(
        place, number(row.get("step")), text(row.get("key"))
    )


def _prediction(place: Place, row: Row) -> tuple[str | None, PredictionPlace]:
    """(identity, value) of a line of predictions."""
    names = (text(row.get(field)) for field in ("id", "benchmark", "split", "category", "subtask"))
    value = PredictionPlace(place, *names, outcome_of_prediction(row), row.get("conflict") is True)
    return _identity(row, "id"), value


def _scan(paths: Sequence[Path], notes: list[str]) -> Iterator[tuple[Place, Row]]:
    """Every object of the files and its place; what is none is counted in `notes`, but for a half-written last line."""
    for path in paths:
        if not path.is_file():
            continue
        bad, offset = 0, 0
        with path.open("rb") as file:
            for line in file:
                row = _object(line)
                if row is not None:
                    yield (path, offset), row
                elif line.endswith(b"\n") and line.strip():
                    bad += 1
                offset += len(line)
        if bad:
            notes.append(f"{path.name}: {bad:,} lines are not JSON objects and were left out")


def _object(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _rows(paths: Sequence[Path], notes: list[str]) -> list[Row]:
    return [row for _, row in _scan(paths, notes)]


def _by_step(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows with a step, in its order; of a step that a resumed run repeated, the last."""
    steps = {number(row.get("step")): row for row in rows}
    return tuple(steps[step] for step in sorted(step for step in steps if math.isfinite(step)))


def _identity(row: Row, *fields: str) -> str | None:
    """What makes a line the same as another one; None where a field is missing: such a line is like no other."""
    if any(row.get(field) is None for field in fields):
        return None
    return json.dumps([row[field] for field in fields])


def _unique(found: Iterator[tuple[str | None, Any]]) -> tuple[Any, ...]:
    """The values, of those with the same identity the last one, at the place of the first."""
    kept: dict[Any, Any] = {}
    for identity, value in found:
        kept[identity if identity is not None else len(kept)] = value
    return tuple(kept.values())


def _json(path: Path, notes: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        notes.append(f"{path.name} cannot be read: {problem}")
        return None
