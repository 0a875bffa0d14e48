"""The figures of a run in a few lines and tables: how it began and ended, its speed, its config, what it skipped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mllm4d_jax.files.jsonl import Row
from mllm4d_jax.report import reading
from mllm4d_jax.report.charts import number_text
from mllm4d_jax.report.columns import column, line, over, quantities, summary, tenths, title, total, written
from mllm4d_jax.report.page import Cell, Column, Markup, join, shortened, table, tag
from mllm4d_jax.report.reading import PredictionPlace, Run, number, text
from mllm4d_jax.report.scores import accuracies

_MAX_REASONS = 100
_MAX_ROWS = 500  # of the table of quarantined records
FIELD = 600  # bytes of a value
_SPEED = ("step_s", "qa_per_s", "rollouts_per_s", "tokens_per_s_device", "mfu", "padding", "data_wait", "memory_gib")
_LEARNING = ("loss", "accuracy", "completion_tokens", "truncated", "dead_groups", "kl", "entropy", "gap", "lr")
_TIME, _REWARD = "time/", "reward/"
_FILES = {
    reading.METRICS: "one line per step; tb/: the same for TensorBoard (tensorboard --logdir tb)",
    reading.EVALS: "one line per evaluation on held-out prompts",
    reading.COMPLETIONS: "completions with their questions, rewards and advantages",
    reading.PREDICTIONS: "one line per answered question",
    reading.RESULTS: "the scores; results.md: their tables",
    reading.SCORED: "the predictions as the newest scoring read them",
    reading.QUARANTINE: "records that could not be used, with the reason",
    "checkpoints": "parameters, optimiser and position; the same command continues from the newest",
    "start": "the policy at the start, which the KL term refers to",
    "trace": "device traces of single steps",
    reading.CONFIG: "the config as it was resolved",
}


def tiles(run: Run) -> list[tuple[str, str]]:
    """Return (what it is, figure) pairs for the top of the page."""
    found = []
    if run.metrics:
        found.append(("steps", f"{number(run.metrics[-1]['step']):,.0f}"))
        ends = [(key, over(tenths(run.metrics)[-1], key)) for key in ("loss", "reward")]
        found += [(f"{key}, at the end", number_text(value)) for key, value in ends if math.isfinite(value)]
        seconds = total(run.metrics, "step_s")
        found += [("time in steps", duration(seconds))] if seconds else []
    if run.evals and math.isfinite(number(run.evals[-1].get("reward"))):
        found.append(("reward, held out", number_text(number(run.evals[-1]["reward"]))))
    places = {"completions": run.completions, "predictions": run.predictions}
    found += [(name, f"{len(several):,}") for name, several in places.items() if several]
    _, share = accuracies(run.results).get(("all", "all"), (0.0, accuracy(run.predictions)))
    found += [("accuracy", f"{share:.1%}")] if math.isfinite(share) else []
    if run.quarantine:
        found.append(("records in quarantine", f"{len(run.quarantine):,}"))
    return found


def findings(run: Run) -> dict[str, str]:
    """Return what the training steps and the held-out evaluations say in a few lines: name -> text."""
    found, parts = {}, tenths(run.metrics)
    if parts:
        first, last = summary(parts[0]), summary(parts[-1])
        for key in ("loss", "accuracy", "reward"):
            if key in first and key in last:
                means = f"means of the first {len(parts[0])} and the last {len(parts[-1])} steps"
                found[title(key)] = f"{written(first, key)} -> {written(last, key)} ({means})"
    found |= _course("held-out loss", run.metrics, "eval_loss", "lowest", min)
    found |= _course("held-out reward", run.evals, "reward", "highest", max)
    if parts:
        whole, steady = summary(run.metrics), summary(_steady(run.metrics))
        found["speed after the first tenth" if len(parts) > 1 else "speed"] = line(steady, _SPEED)
        seconds = total(run.metrics, "step_s")
        found["time in steps"] = f"{duration(seconds)}, {written(whole, 'data_wait')} of it waiting for data"
        found["compiled since the last start"] = line(whole, ("compiles", "retraces"))
        found["records skipped"] = written(whole, "quarantined")
    return {name: value for name, value in found.items() if value not in ("", "–")}


def _course(name: str, rows: Sequence[Row], key: str, word: str, best: Callable) -> dict[str, str]:
    """First, best and last value of what is measured now and then; {} where it never was."""
    known = [(value, row) for row in rows if math.isfinite(value := number(row.get(key)))]
    if not known:
        return {}
    best_row = best(known, key=lambda pair: pair[0])[1]
    first, top, last = (
        f"{written(row, key)} after step {written(row, 'step')}" for row in (known[0][1], best_row, known[-1][1])
    )
    return {name: f"{first}, {word} {top}, {last}"}


def _steady(rows: Sequence[Row]) -> list[Row]:
    """The rows after the first tenth, in which programs are compiled."""
    parts = tenths(rows)
    return [row for part in parts[1:] or parts for row in part]


def accuracy(predictions: Sequence[PredictionPlace]) -> float:
    """Share of the predictions that are right; those without a letter are not. NaN for none."""
    return sum(one.outcome == "correct" for one in predictions) / len(predictions) if predictions else math.nan


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def figure_tables(run: Run) -> Markup:
    """Return everything there is about a run in numbers."""
    said = dict(run.facts) | findings(run)
    about = [[name, shortened(value, FIELD)] for name, value in said.items()]
    tables = [table([Column("about the run"), Column("value")], about, caption="The run")] if about else []
    tables += [steps_table(run.metrics), phases_table(run.metrics), evals_table(run.evals), metric_table(run.metrics)]
    return join(tables)


def steps_table(rows: Sequence[Row]) -> Markup | None:
    """Return the steps in ten parts; None without any."""
    parts = tenths(rows)
    means = [summary(part) for part in parts]
    rewards = [key for key in means[0] if key.startswith(_REWARD)] if means else []
    shown = [key for key in ("reward", *rewards, *_LEARNING, *_SPEED) if any(key in mean for mean in means)]
    spans = [f"{written(part[0], 'step')}-{written(part[-1], 'step')}" for part in parts]
    return _course_table("steps", spans, means, shown, "Steps in ten parts")


def evals_table(rows: Sequence[Row]) -> Markup | None:
    """Return every evaluation on held-out prompts; None without any."""
    steps = [written(row, "step") for row in rows]
    known = [{key: number(row.get(key)) for key in quantities([row])} for row in rows]
    return _course_table("after step", steps, known, quantities(rows), "Held-out prompts")


def _course_table(
    head: str, names: Sequence[str], rows: Sequence[Mapping[str, float]], keys: Sequence[str], caption: str
) -> Markup | None:
    """A row of figures for each name; None without any."""
    if not rows:
        return None
    cells = [
        [name, *(Cell(written(row, key), row.get(key, math.nan)) for key in keys)]
        for name, row in zip(names, rows, strict=True)
    ]
    return table([Column(head), *(Column(title(key), True) for key in keys)], cells, caption=caption)


def phases_table(rows: Sequence[Row]) -> Markup | None:
    """Return the seconds of a step by phase, after the first tenth, which compiles; None where they are not known."""
    means = {key: over(_steady(rows), key) for key in quantities(rows) if key.startswith(_TIME)}
    if not means:
        return None
    heads = [Column("seconds"), *(Column(key.removeprefix(_TIME), True) for key in means)]
    caption = "Phases of a step, mean after the first tenth"
    return table(heads, [["of a step", *(figure(value) for value in means.values())]], caption=caption)


def metric_table(rows: Sequence[Row]) -> Markup | None:
    """Return every quantity over the first and the last tenth of the steps, and its extremes; None without any."""
    if not rows:
        return None
    heads = [Column("quantity"), *(Column(name, True) for name in ("first tenth", "last tenth", "least", "greatest"))]
    parts, cells = tenths(rows), []
    for name in quantities(rows):
        values = column(rows, name)[1]
        known = values[np.isfinite(values)]
        figures = (over(parts[0], name), over(parts[-1], name), float(known.min()), float(known.max()))
        cells.append([name, *(figure(value) for value in figures)])
    return table(heads, cells, caption="Quantities of the training steps", filter=True)


def figure(value: float) -> Cell:
    """A number with four digits; what is none is a dash."""
    return Cell(f"{value:.4g}", value) if math.isfinite(value) else Cell("–", math.nan)


def config_table(config: Mapping[str, Any]) -> Markup:
    """The resolved config, searchable."""
    rows = [[tag("code", name), tag("code", value_text(value))] for name, value in sorted(config.items())]
    return table([Column("key"), Column("value")], rows, caption="Config", filter=True)


def value_text(value: Any) -> Markup:
    """A config value as JSON writes it, texts without quotes, '' as ''."""
    return shortened(text(value) or ("null" if value is None else "''"), FIELD)


def file_table(run: Run) -> Markup:
    """Return what else is in the workdir."""
    rows = [[tag("code", name), what] for name, what in _FILES.items() if (run.path / name).exists()]
    return table([Column("file"), Column("holds")], rows, caption="Files of the workdir")


def quarantine_section(rows: Sequence[Row]) -> Markup:
    """Counts by reason, and the records themselves."""
    counted = Counter(text(row.get("reason")) or "unknown" for row in rows)
    counts = [[shortened(reason, FIELD), Cell(f"{n:,}", n)] for reason, n in counted.most_common(_MAX_REASONS)]
    fields = ("key", "reason", "message")
    shown = [[shortened(text(row.get(name)), FIELD) for name in fields] for row in rows[:_MAX_ROWS]]
    more = f"{len(rows) - _MAX_ROWS:,} further records are in quarantine.jsonl." if len(rows) > _MAX_ROWS else ""
    reasons = table([Column("reason"), Column("records", True)], counts, caption="Reasons")
    records = table([Column(name) for name in fields], shown, caption="Records that could not be used", filter=True)
    return join([reasons, records, tag("p", more, class_="note") if more else None])
