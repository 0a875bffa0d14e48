"""Evaluation tables: those of results.json, or, without that file, counted from the predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm4d_jax.files.quoting import cut
from mllm4d_jax.report.charts import bars
from mllm4d_jax.report.page import Cell, Column, Markup, join, shortened, table, tag
from mllm4d_jax.report.page import number as number_cell
from mllm4d_jax.report.reading import MOST_NAME, PredictionPlace, number, text

_MAX_ROWS = 2000  # of one table of results.json
_FIELD, _LONG = 600, 20_000  # bytes of a value, and of what is not in a table


@dataclass(frozen=True)
class Count:
    """How the predictions of one group came out.

    Attributes:
      key: benchmark and split; "all", "category" or "subtask"; which category or subtask, '' for all.
      n, correct, unparsed, conflicts: numbers of predictions.
    """

    key: tuple[str, str, str]
    n: int
    correct: int
    unparsed: int
    conflicts: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


def counts(predictions: Sequence[PredictionPlace]) -> list[Count]:
    """All, per category and per subtask of each benchmark and split; what has no letter counts as wrong."""
    groups: dict[tuple[str, str, str], list[PredictionPlace]] = {}
    for one in predictions:
        group = " ".join(filter(None, (one.benchmark, one.split))) or "predictions"
        for part, name in (("all", ""), ("category", one.category), ("subtask", one.subtask)):
            if name or part == "all":
                groups.setdefault((group, part, name), []).append(one)
    return [
        Count(
            key,
            n=len(found),
            correct=sum(one.outcome == "correct" for one in found),
            unparsed=sum(one.outcome == "unparsed" for one in found),
            conflicts=sum(one.conflict for one in found),
        )
        for key, found in sorted(groups.items())
    ]


def count_table(found: Sequence[Count]) -> Markup:
    """The counts as a table."""
    columns = [Column("set"), Column("by"), Column("of"), Column("n", True), Column("accuracy", True)]
    columns += [Column("unparsed", True, "no letter was found in the response"), Column("conflicts", True, "several")]
    rows = [
        [
            *c.key,
            number_cell(c.n),
            number_cell(c.accuracy, 1, percent=True),
            number_cell(c.unparsed / c.n, 1, percent=True, tone="warn" if c.unparsed else ""),
            number_cell(c.conflicts),
        ]
        for c in found
    ]
    return table(columns, rows, caption="Accuracy, counted from the predictions", filter=len(rows) > 8)


def result_tables(results: Any) -> Markup:
    """Return what results.json says, its tables and a chart of its groups; another layout is shown as it is."""
    tables = results.get("tables") if isinstance(results, Mapping) else None
    if not isinstance(tables, list):
        return tag("pre", shortened(json.dumps(results, indent=1, ensure_ascii=False), _LONG))
    charts = tag("div", *_group_charts(results), class_="charts")
    return join([tag("p", shortened(text(results.get("summary")), _LONG)), charts, *map(_text_table, tables)])


def _text_table(block: Any) -> Markup | None:
    """A table of texts {"title", "note", "heads", "rows"}; None for anything else."""
    block = block if isinstance(block, Mapping) else {}
    heads, rows = (block.get(name) if isinstance(block.get(name), list) else [] for name in ("heads", "rows"))
    rows = [[text(cell) for cell in row] for row in rows if isinstance(row, list) and len(row) == len(heads)]
    if not (heads and rows):
        return None
    numeric = [n > 0 and all(_leading(row[n]) is not None for row in rows) for n in range(len(heads))]
    columns = [Column(cut(text(head), MOST_NAME) or "group", numeric[n]) for n, head in enumerate(heads)]
    cells = [
        [Cell(shortened(cell, _FIELD), _leading(cell) if numeric[n] else None) for n, cell in enumerate(row)]
        for row in rows[:_MAX_ROWS]
    ]
    made = table(columns, cells, caption=cut(text(block.get("title")), MOST_NAME), filter=len(rows) > 8)
    return join([made, tag("p", shortened(text(block.get("note")), _LONG), class_="note")])


def _leading(cell: str) -> float | None:
    """The number that a text begins with; NaN for a dash, None for other text."""
    if cell.startswith("–"):
        return math.nan
    try:
        return float(cell.split(" ", 1)[0])
    except ValueError:
        return None


def _group_charts(results: Mapping[str, Any]) -> Iterator[Markup]:
    """Accuracy beside chance, one chart for each way in which the questions are grouped."""
    for by in dict.fromkeys(by for by, _ in accuracies(results) if by != "all"):
        part = [group for group in _groups(results) if text(group.get("table")) == by]
        series = {
            key: [100 * value if 0 <= (value := number(group.get(key))) <= 1 else math.nan for group in part]
            for key in ("accuracy", "chance")
        }
        yield bars([text(group.get("name")) for group in part], series, title=f"Accuracy by {by}", unit="%")


def accuracies(results: Any) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (table, name) -> (number of questions, accuracy) of the groups in results.json; {} where it has none."""
    return {
        (text(group.get("table")), text(group.get("name"))): (number(group.get("n")), number(group.get("accuracy")))
        for group in _groups(results)
    }


def _groups(results: Any) -> list[Mapping[str, Any]]:
    groups = results.get("groups") if isinstance(results, Mapping) else None
    return [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
