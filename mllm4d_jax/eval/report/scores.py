"""Evaluation tables: those of results.json as they stand, or, without that file, counted from the predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm4d_jax.eval.report.reading import PredictionPlace, number, text
from mllm4d_jax.report.page import Cell, Column, Markup, join, table, tag
from mllm4d_jax.report.page import number as number_cell

_MAX_ROWS = 2000  # of one table of results.json
_DEEP = 8  # levels of results.json


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


def named_rows(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """(name, rows of plain values) of the tables in a JSON value.

    A list of objects is a table with a row each; an object of objects without further structure is one with their
    names in front; the plain values of an object are a table of names and values. The rest is looked into.
    """
    name = path or "results"
    if depth > _DEEP:
        return
    if isinstance(value, list):
        rows = [dict(_leaves(row)) for row in value if isinstance(row, Mapping)]
        rows += [{"value": text(row)} for row in value if not isinstance(row, (Mapping, list))]
        if rows:
            yield name, rows
        for n, row in enumerate(value):
            yield from named_rows(row, f"{path}[{n}]", depth + 1) if isinstance(row, list) else ()
    elif isinstance(value, Mapping):
        inner = {key: part for key, part in value.items() if isinstance(part, Mapping)}
        plain = [{"name": key, "value": part} for key, part in value.items() if _is_plain(part)]
        if plain:
            yield name, plain
        if inner and all(all(_is_plain(leaf) for leaf in part.values()) for part in inner.values()):
            yield name, [{"": key, **part} for key, part in inner.items()]
            inner = {}
        for key, part in value.items():
            if key in inner or isinstance(part, list):
                yield from named_rows(part, f"{path}, {key}" if path else key, depth + 1)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (Mapping, list))


def _leaves(row: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted name -> plain value of an object; short lists of numbers (an interval, say) stay together as text."""
    for key, value in row.items():
        if isinstance(value, Mapping) and depth < _DEEP:
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        elif isinstance(value, list):
            yield f"{prefix}{key}", " to ".join(_shown(v) for v in value) if len(value) == 2 else text(value)
        else:
            yield f"{prefix}{key}", value


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    names = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {key: all(math.isfinite(number(row[key])) for row in rows if row.get(key) is not None) for key in names}
    columns = [Column(key.replace("_", " "), numeric[key]) for key in names]
    cells = [[_cell(row.get(key)) for key in names] for row in rows[:_MAX_ROWS]]
    shown = table(columns, cells, caption=name.replace("_", " "), filter=len(rows) > 8)
    if len(rows) <= _MAX_ROWS:
        return shown
    return join([shown, tag("p", f"{len(rows) - _MAX_ROWS:,} further rows are in results.json.", class_="note")])


def _cell(value: Any) -> Cell:
    amount = number(value)
    return Cell(_shown(value), amount) if math.isfinite(amount) else Cell(_shown(value))


def _shown(value: Any) -> str:
    """A plain value as text: whole numbers in full, others with four digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else text(value)
