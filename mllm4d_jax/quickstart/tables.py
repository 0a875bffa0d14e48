"""The results as tables of text: for a terminal of 100 columns, and cell by cell for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mllm4d_jax.eval.statistics import Estimate
from mllm4d_jax.quickstart.results import COMPARED, KINDS, ROWS, Results, accuracy_difference, error_difference

# Subtask -> its head.
HEADS = {
    "camera_absolute_distance": "cam dist",
    "camera_relative_direction": "cam dir",
    "object_absolute_distance": "obj dist",
    "object_camera_absolute_distance": "o-c dist",
    "object_camera_relative_distance": "o-c near",
    "object_camera_relative_direction": "o-c dir",
}
NOTE = (
    "Accuracy in percent of greedy answers about held-out worlds with exact truth, and its mean over the subtasks; "
    "brackets are 95 % intervals (bootstrap over worlds). Distance and direction of the camera (cam), of an object "
    "(obj), and of an object seen from the camera (o-c). Centre errors are the mean metres between the centres that a "
    "model writes and the true ones; one that answers with a letter alone writes none. 'GRPO' and 'equal-time SFT' go "
    "on from the cold start, in worlds that it has not seen. This is one training seed: what differs by less than its "
    "interval may be chance."
)

Table = tuple[str, list[str], list[list[str]]]  # caption, heads, rows of text


def tables(results: Results) -> list[Table]:
    """Return all tables: accuracies and centre errors, differences, sampled rewards."""
    return [_accuracies(results), _differences(results), _rewards(results)]


def text(results: Results) -> str:
    """Return the tables as lines of at most 100 columns."""
    return "\n\n".join(_lines(*table) for table in tables(results))


def _accuracies(results: Results) -> Table:
    rows = []
    for stage, name in ROWS.items():
        one = results.examined[stage]
        known = [100 * one.accuracy(subtask).value if subtask in one.subtasks else math.nan for subtask in HEADS]
        errors = [one.error(kind).value for kind in KINDS]
        rows.append([name, percent(one.accuracy()), *(_number(v, 1) for v in known), *(_number(v, 2) for v in errors)])
    guess = [results.chance.get(subtask, math.nan) for subtask in HEADS]
    mean = sum(results.chance.values()) / len(results.chance)
    rows.append(["chance", f"{100 * mean:.1f}", *(_number(100 * v, 1) for v in guess), "–", "–"])
    return "Accuracy and centre errors", ["model", "mean, %", *HEADS.values(), "cam m", "obj m"], rows


def _differences(results: Results) -> Table:
    rows = []
    for before, after in COMPARED:
        first, second = results.examined[before], results.examined[after]
        cells = [percent(accuracy_difference(first, second), signed=True)]
        for kind in KINDS:
            apart = error_difference(first, second, kind)
            cells.append(percent(apart, signed=True) if apart.n else "–")  # of metres: centimetres
        rows.append([f"{ROWS[after]} - {ROWS[before]}", *cells])
    return (
        "Differences on the same questions",
        ["difference", "accuracy, points", "camera centre, cm", "object centre, cm"],
        rows,
    )


def _rewards(results: Results) -> Table:
    heads = ["run", *next(iter(results.rewards.values()))]
    rows = [
        [ROWS[f"eval_{stage}"], *(f"{first:.3f} -> {last:.3f}" for first, last in means.values())]
        for stage, means in results.rewards.items()
    ]
    return "Rewards of sampled completions, first and last tenth of the steps", heads, rows


def percent(estimate: Estimate, signed: bool = False) -> str:
    """Return a share with its interval in percent, e.g. `72.7 [70.1, 75.2]`."""
    value, low, high = (f"{100 * x:{'+' if signed else ''}.1f}" for x in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _lines(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is names and whose others are numbers; heads of two words take two lines."""
    split = [head.rsplit(" ", 1) if len(head) < 9 and " " in head else ["", head] for head in heads]
    above, below = zip(*split, strict=True)
    shown = [*([list(above)] if any(above) else []), list(below), *rows]
    widths = [max(len(row[n]) for row in shown) for n in range(len(heads))]
    lines = [caption]
    for row in shown:
        cells = [
            f"{cell:<{width}}" if n == 0 else f"{cell:>{width}}"
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
