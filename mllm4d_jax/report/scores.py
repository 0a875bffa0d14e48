"""Evaluation tables: those of results.json as they stand, or, without that file, counted from the predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm4d_jax.report.page import Cell, Column, Markup, join, table, tag
from mllm4d_jax.report.page import number as number_cell
from mllm4d_jax.report.reading import MAX_DEPTH, PredictionPlace, flat, number, text
from mllm4d_jax.report.said import shortened

_MAX_ROWS = 2000  # of one table of results.json
# Fields of results.json that are shares, which are shown in percent; `low` and `high` are the ends of their interval.
_SHARES = frozenset({"accuracy", "chance", "best_letter", "first", "second", "difference", "detectable", "level"})
_FIELD = 600  # bytes of a value


@dataclass(frozen=True)
class Count:
    """How the predictions of one group came out.

    Attributes:
      group: benchmark and split.
      part: "all", "category" or "subtask".
      name: which category or subtask; '' for all.
      n, correct, unparsed, conflicts: numbers of predictions.
    """

    group: str
    part: str
    name: str
    n: int
    correct: int
    unparsed: int
    conflicts: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def key(self) -> tuple[str, str, str]:
        return self.group, self.part, self.name


def counts(predictions: Sequence[PredictionPlace]) -> list[Count]:
    """All, per category and per subtask of each benchmark and split; what has no letter counts as wrong."""
    groups: dict[tuple[str, str, str], list[PredictionPlace]] = {}
    for one in predictions:
        group = " ".join(filter(None, (one.benchmark, one.split))) or "predictions"
        groups.setdefault((group, "all", ""), []).append(one)
        for part, name in (("category", one.category), ("subtask", one.subtask)):
            if name:
                groups.setdefault((group, part, name), []).append(one)
    return [
        Count(
            *key,
            n=len(found),
            correct=sum(one.outcome == "correct" for one in found),
            unparsed=sum(one.outcome == "unparsed" for one in found),
            conflicts=sum(one.conflict for one in found),
        )
        for key, found in sorted(
            groups.items(), key=lambda item: (item[0][0], ("all", "category", "subtask").index(item[0][1]), item[0][2])
        )
    ]


def count_table(found: Sequence[Count]) -> Markup:
    """The counts as a table."""
    columns = [Column("set"), Column("by"), Column("of"), Column("n", True), Column("accuracy", True)]
    columns += [Column("unparsed", True, "no letter was found in the response"), Column("conflicts", True, "several")]
    rows = [
        [
            c.group,
            c.part,
            c.name,
            number_cell(c.n),
            number_cell(c.accuracy, 1, percent=True),
            number_cell(c.unparsed / c.n, 1, percent=True, tone="warn" if c.unparsed else ""),
            number_cell(c.conflicts),
        ]
        for c in found
    ]
    return table(columns, rows, caption="Accuracy, counted from the predictions", filter=len(rows) > 8)


def result_tables(results: Any) -> Markup:
    """Every table that can be read out of results.json, in its order, under the names it has there."""
    return join([_table(name, rows) for name, rows in named_rows(results)])


def named_rows(results: Any) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return (name, rows of plain values) of the tables in a JSON value.

    A list of objects is a table with a row each, and so is an object of objects, with their names in front. All plain
    values elsewhere make one more table of names and values, the last.
    """
    tables: list[tuple[str, list[Mapping[str, Any]]]] = []
    plain: list[Mapping[str, Any]] = []

    def collect(value: Any, path: str, depth: int) -> None:
        members = value if isinstance(value, list) else []
        rows = [dict(flat(row)) for row in members if isinstance(row, Mapping)]
        nested = isinstance(value, Mapping) and depth <= MAX_DEPTH
        if nested and len(value) > 1 and all(isinstance(part, Mapping) for part in value.values()):
            rows = [{"name": name, **dict(flat(part))} for name, part in value.items()]
        if rows:
            tables.append((path or "results", rows))
        elif nested:
            for name, part in value.items():
                collect(part, f"{path}.{name}" if path else name, depth + 1)
        elif value not in (None, "", []):
            plain.append({"name": path or "results", "value": shown(value, path)})

    collect(results, "", 0)
    return [*tables, *([("further values", plain)] if plain else [])]


def accuracies(results: Any) -> dict[tuple[str, str], tuple[float, float]]:
    """(table, name) -> (number of questions, accuracy) of the groups in results.json; {} where it has none."""
    groups = results.get("groups") if isinstance(results, Mapping) else None
    found = [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    return {
        (text(group.get("table")), text(group.get("name"))): (number(group.get("n")), number(group.get("accuracy")))
        for group in found
    }


def _with_interval(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the two ends of its interval as one text."""
    if not {"low", "high"} <= row.keys():
        return dict(row)
    known = all(math.isfinite(number(row[end])) for end in ("low", "high"))
    joined = f"[{number(row['low']):.1%}, {number(row['high']):.1%}]" if known else "–"
    return {
        "interval" if key == "low" else key: joined if key == "low" else v for key, v in row.items() if key != "high"
    }


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [_with_interval(row) for row in rows[:_MAX_ROWS]]
    names = list(dict.fromkeys(key for row in rows for key in row))
    names = [key for key in names if any(row.get(key) not in (None, "") for row in rows)]
    numeric = {key: all(math.isfinite(number(row[key])) for row in rows if row.get(key) is not None) for key in names}
    columns = [Column(key.replace("_", " "), numeric[key]) for key in names]
    cells = [[_cell(row.get(key), key) for key in names] for row in rows]
    made = table(columns, cells, caption=_words(name), filter=len(rows) > 8)
    if len(rows) < _MAX_ROWS:
        return made
    return join([made, tag("p", f"No more than {_MAX_ROWS:,} rows are shown.", class_="note")])


def _words(name: str) -> str:
    """A dotted name as a heading."""
    words = name.replace("_", " ").replace(".", ", ")
    return words[:1].upper() + words[1:]


def _cell(value: Any, key: str) -> Cell:
    amount = number(value)
    return Cell(shown(value, key), amount if math.isfinite(amount) or value is None else None)


def shown(value: Any, key: str = "") -> Markup:
    """Return a value as text: whole numbers in full, shares in percent, others with four digits, lists in one line."""
    return shortened(_said(value, key), _FIELD)


def _said(value: Any, key: str = "") -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if key.rpartition(".")[2] in _SHARES and math.isfinite(number(value)):
        return f"{number(value):.1%}"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, list):
        return "; ".join(map(_said, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(part, name)}" for name, part in value.items())
    return text(value)
