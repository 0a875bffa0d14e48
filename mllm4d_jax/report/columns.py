"""The columns of a run's steps: what each is called, how it is written, and how several steps become one number.

Training (progress bar, TensorBoard) and pages use this one table, so that a number means the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mllm4d_jax.files.jsonl import Row
from mllm4d_jax.report.reading import number


@dataclass(frozen=True)
class Quantity:
    """A column.

    Attributes:
      title: what people call it; '' is its name with blanks.
      form: format of its values.
      kind: what several steps make of it. "mean"; "rate": the mean weighed by the time of the steps; "sum": a count,
        of which rates are shown; "last": the newest value, which is not noisy; "place": says where a step is or ran,
        likewise the newest, and is neither drawn nor listed.
    """

    title: str = ""
    form: str = ".4g"
    kind: str = "mean"


_LONG = 1e15  # a number above this is written with a power of ten
# What is not here is a mean and is called what it is named.
_TABLE: Mapping[str, Quantity] = MappingProxyType(
    {
        "step": Quantity(form=".0f", kind="place"),
        **dict.fromkeys(("position", "devices"), Quantity(kind="place")),
        "n": Quantity(form=".0f", kind="last"),
        **dict.fromkeys(("examples", "clips", "tokens", "visual", "supervised"), Quantity(kind="sum")),
        "loss": Quantity(form=".4f"),
        "eval_loss": Quantity("held-out loss", ".4f", "last"),
        "accuracy": Quantity("token accuracy", ".3f"),
        "reward": Quantity(form=".3f"),
        "kl": Quantity("KL", ".4f"),
        "entropy": Quantity(form=".4f"),
        "gap": Quantity(form=".2g"),
        "lr": Quantity(form=".2e", kind="last"),
        "completion_tokens": Quantity("tokens", ".0f"),
        "truncated": Quantity("cut off", ".0%"),
        "dead_groups": Quantity(form=".0%"),
        "step_s": Quantity("s/step", ".3g"),
        "qa_per_s": Quantity("QA/s", ".2f", "rate"),
        "rollouts_per_s": Quantity("rollouts/s", ".2f", "rate"),
        "tokens_per_s": Quantity("tokens/s", ".0f", "rate"),
        "tokens_per_s_device": Quantity("tokens/s/device", ".0f", "rate"),
        "mfu": Quantity("MFU", ".0%", "rate"),
        "data_wait": Quantity("waiting for data", ".0%", "rate"),
        "padding": Quantity(form=".0%"),
        "memory_gib": Quantity("GiB per device", ".1f", "last"),
        "quarantined": Quantity("records skipped", ".0f", "last"),
        "compiles": Quantity("compilations", ".0f", "last"),
        "retraces": Quantity(form=".0f", kind="last"),
    }
)


def quantity(key: str) -> Quantity:
    """Return what is known of a column; every component of the reward is like the reward."""
    return _TABLE.get("reward" if key.startswith("reward/") else key, Quantity())


def title(key: str) -> str:
    """Return what a column is called."""
    return quantity(key).title or key.removeprefix("reward/").replace("_", " ")


def written(values: Mapping[str, float], key: str) -> str:
    """Return a value as text, a dash where there is none."""
    if key not in values:
        return "–"
    return format(values[key], quantity(key).form if abs(values[key]) < _LONG else ".3g")


def line(values: Mapping[str, float], keys: Sequence[str]) -> str:
    """Return the values there are in one line, each behind its name."""
    return ", ".join(f"{title(key)} {written(values, key)}" for key in keys if key in values)


def quantities(rows: Sequence[Row]) -> list[str]:
    """Return the columns that have a number somewhere, in the order of the rows, but for those of kind "place"."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if math.isfinite(number(value)))
    return [name for name in names if quantity(name).kind != "place"]


def column(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values) f64[N] of the rows that have a column; a value that is no number is NaN."""
    found = [row for row in rows if key in row]
    return tuple(np.array([number(row[name]) for row in found], np.float64) for name in ("step", key))


def tenths(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Return the rows of a run in ten parts, fewer where there are fewer rows; [] for none."""
    size = max(1, math.ceil(len(rows) / 10))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def over(rows: Sequence[Row], key: str) -> float:
    """Return what consecutive steps make of a column, as its kind says; NaN where no row has a number of it.

    Of a count that is the mean per step. Values that are not finite are left out.
    """
    known = [(row, value) for row in rows if math.isfinite(value := number(row.get(key)))]
    if not known:
        return math.nan
    kind = quantity(key).kind
    if kind in ("last", "place"):
        return known[-1][1]
    seconds = sum(number(row.get("step_s")) for row, _ in known) if kind == "rate" else 0.0
    if seconds > 0:
        return sum(value * number(row["step_s"]) for row, value in known) / seconds
    return sum(value for _, value in known) / len(known)


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Return consecutive steps as one: every column but counts, and in their place rates; unknown ones are left out.

    "qa_per_s" and "tokens_per_s" count the whole run, "tokens_per_s_device" one device; "visual_share" is of the real
    tokens and "data_wait" of the time.
    """
    names = dict.fromkeys(key for row in rows for key in row if key != "step")
    out = {key: over(rows, key) for key in names if quantity(key).kind != "sum"}
    seconds = max(total(rows, "step_s"), 1e-9)
    if "examples" in names:
        out["qa_per_s"] = total(rows, "examples") / seconds
    if "tokens" in names:
        tokens = total(rows, "tokens")
        out["tokens_per_s"] = tokens / seconds
        device_s = sum(number(row.get("step_s")) * number(row.get("devices")) for row in rows)
        out["tokens_per_s_device"] = tokens / max(device_s, 1e-9)
        out["visual_share"] = total(rows, "visual") / max(tokens, 1.0)
    if names.keys() & {"data_wait_s", "time/data"}:
        out["data_wait"] = (total(rows, "data_wait_s") + total(rows, "time/data")) / seconds
    return {key: value for key, value in out.items() if math.isfinite(value)}


def total(rows: Sequence[Row], key: str) -> float:
    """Return the sum of a column, what is no finite number left out."""
    return sum(value for row in rows if math.isfinite(value := number(row.get(key))))
