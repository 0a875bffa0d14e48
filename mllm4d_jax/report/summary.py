"""The figures of a run in a few numbers and tables: how it began and ended, its config, what it could not use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm4d_jax.report.charts import number_text
from mllm4d_jax.report.curves import column
from mllm4d_jax.report.page import Cell, Column, Markup, join, table, tag
from mllm4d_jax.report.reading import PredictionPlace, Row, Run, number, text
from mllm4d_jax.report.said import shortened
from mllm4d_jax.report.scores import accuracies

_MAX_ROWS = 500  # of the table of quarantined records
_FIELD = 600  # bytes of a value
_SKIPPED = ("step", "position", "devices")


def tiles(run: Run) -> list[tuple[str, str]]:
    """(what it is, figure) pairs for the top of the page."""
    found = []
    if run.metrics:
        found.append(("steps", f"{number(run.metrics[-1]['step']):,.0f}"))
        for name, key in (("loss, at the end", "loss"), ("reward, at the end", "reward")):
            _, last = ends(run.metrics, key)
            found += [(name, number_text(last))] if math.isfinite(last) else []
        seconds = sum(value for value in column(run.metrics, "step_s")[1].tolist() if math.isfinite(value))
        found += [("time in steps", duration(seconds))] if seconds else []
    if run.evals and math.isfinite(number(run.evals[-1].get("reward"))):
        found.append(("reward, held out", number_text(number(run.evals[-1]["reward"]))))
    if run.completions:
        found.append(("completions", f"{len(run.completions):,}"))
    if run.predictions:
        found.append(("predictions", f"{len(run.predictions):,}"))
    _, share = accuracies(run.results).get(("all", "all"), (0.0, accuracy(run.predictions)))
    found += [("accuracy", f"{share:.1%}")] if math.isfinite(share) else []
    if run.quarantine:
        found.append(("records in quarantine", f"{len(run.quarantine):,}"))
    return found


def accuracy(predictions: Sequence[PredictionPlace]) -> float:
    """Share of the predictions that are right; those without a letter are not. NaN for none."""
    right = sum(one.outcome == "correct" for one in predictions)
    return right / len(predictions) if predictions else math.nan


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def ends(rows: Sequence[Row], key: str) -> tuple[float, float]:
    """Mean of a quantity over the first and over the last tenth of the rows that have it; NaN where none has."""
    return _ends(_known(rows, key))


def _known(rows: Sequence[Row], key: str) -> np.ndarray:
    """The values of a quantity that are numbers, f64[N]."""
    values = column(rows, key)[1]
    return values[np.isfinite(values)]


def _ends(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    part = max(1, math.ceil(len(values) / 10))
    return float(values[:part].mean()), float(values[-part:].mean())


def quantities(rows: Sequence[Row]) -> list[str]:
    """Names of everything numeric in the rows."""
    names = {key: None for row in rows for key, value in row.items() if math.isfinite(number(value))}
    return [name for name in names if name not in _SKIPPED]


def metric_table(run: Run) -> Markup:
    """Every quantity of the run: over its first tenth, its last tenth, and its extremes."""
    heads = [Column("quantity"), *(Column(name, True) for name in ("first tenth", "last tenth", "least", "greatest"))]
    rows = []
    for name in quantities(run.metrics):
        known = _known(run.metrics, name)
        figures = (*_ends(known), float(known.min()), float(known.max()))
        rows.append([name, *(figure(value) for value in figures)])
    return table(heads, rows, caption="Quantities of the training steps", filter=True)


def figure(value: float) -> Cell:
    """A number with four digits; what is none is a dash."""
    return Cell(f"{value:.4g}", value) if math.isfinite(value) else Cell("–", math.nan)


def config_table(config: Mapping[str, Any]) -> Markup:
    """The resolved config, searchable."""
    rows = [[tag("code", name), tag("code", value_text(value))] for name, value in sorted(config.items())]
    return table([Column("key"), Column("value")], rows, caption="Config", filter=True)


def value_text(value: Any) -> Markup:
    """A config value as JSON writes it, texts without quotes, '' as ''."""
    return shortened(text(value) or ("null" if value is None else "''"), _FIELD)


def quarantine_section(rows: Sequence[Row]) -> Markup:
    """Counts by reason, and the records themselves."""
    reasons = Counter(text(row.get("reason")) or "unknown" for row in rows)
    counts = [[shortened(reason, _FIELD), Cell(f"{n:,}", n)] for reason, n in reasons.most_common()]
    fields = ("key", "reason", "message")
    shown = [[shortened(text(row.get(name)), _FIELD) for name in fields] for row in rows[:_MAX_ROWS]]
    more = f"{len(rows) - _MAX_ROWS:,} further records are in quarantine.jsonl." if len(rows) > _MAX_ROWS else ""
    return join(
        [
            table([Column("reason"), Column("records", True)], counts, caption="Reasons"),
            table([Column(name) for name in fields], shown, caption="Records that could not be used", filter=True),
            tag("p", more, class_="note") if more else None,
        ]
    )


def notes_section(notes: Sequence[str]) -> Markup:
    """What could not be read."""
    return tag("ul", *(tag("li", shortened(note, _FIELD)) for note in notes))
