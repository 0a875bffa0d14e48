"""Curves of a run over its steps, or of several runs over each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mllm4d_jax.report.charts import drawable, lines
from mllm4d_jax.report.columns import column, quantities, quantity
from mllm4d_jax.report.page import Markup, join, tag
from mllm4d_jax.report.reading import Row, Run

_SMOOTH_FROM = 50  # steps; shorter runs are drawn as they are
_SMOOTH_PART, _SMOOTH_LEAST, _SMOOTH_MOST = 25, 5, 200  # the mean is over this part of the run, within these steps
_BLOCK = 4096  # steps averaged at once, for the sake of memory
HELD_OUT = "held out"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: its title, what its y axis is, and the quantities in it (keys of a row, without a run's name)."""

    title: str
    unit: str
    keys: tuple[str, ...]
    log: bool = False


# Panels of known quantities by group. What a row has besides goes to the group `_OTHER`.
_LEARNING = (
    Panel("Loss", "loss", ("loss", "eval_loss")),
    Panel("Token accuracy", "share", ("accuracy",)),
    Panel("Learning rate", "rate", ("lr",)),
    Panel("Gradient norm before clipping", "norm", ("grad_norm",), log=True),
)
_POLICY = (
    Panel("KL divergence from the reference", "nats", ("kl",)),
    Panel("Entropy", "nats", ("entropy",)),
    Panel("Probability ratio", "mean", ("ratio",)),
    Panel("Clipped tokens", "value", ("clipped_low", "clipped_high")),
    Panel("Importance weight", "mean", ("importance",)),
    Panel("Gap between sampler and learner", "nats", ("gap", "gap_max"), log=True),
    Panel("Groups and completions that teach nothing", "value", ("dead_groups", "truncated", "dropped")),
    Panel("Length of the completions", "tokens", ("completion_tokens", "completion_tokens_max")),
    Panel("Staleness", "updates", ("staleness",)),
)
_SPEED = (
    Panel("Time of a step", "seconds", ("step_s", "data_wait_s")),
    Panel("Rollouts", "per second", ("rollouts_per_s",)),
    Panel("Tokens", "per second", ("tokens_per_s",)),
    Panel("Model FLOPs utilisation", "share", ("mfu",)),
    Panel("Padding", "share", ("padding",)),
    Panel("Memory", "GiB per device", ("memory_gib",)),
    Panel("Records in quarantine", "so far", ("quarantined",)),
)
_TIME, _REWARD, _STD = "time/", "reward/", "reward_std/"
_OTHER = "Other quantities"


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Panel]]]:
    """(group, panels) of everything these rows hold a number of."""
    present = {key for key in quantities(rows) if key != "n"}  # which is the same at every evaluation
    rewards = sorted(key for key in present if key.startswith(_REWARD))
    components = (Panel(f"Reward: {key.removeprefix(_REWARD)}", "reward", (key,)) for key in rewards)
    times = tuple(sorted(key for key in present if key.startswith(_TIME)))
    named = [
        ("Learning", _LEARNING),
        ("Rewards", (Panel("Total reward", "reward", ("reward",)), *components)),
        ("Policy", _POLICY),
        ("Speed", (*_SPEED, Panel("Phases of a step", "seconds", times))),
    ]
    known = {key for _, panels in named for panel in panels for key in panel.keys}
    known |= {key for key in present if key.startswith(_STD)}
    named.append((_OTHER, tuple(Panel(key, "value", (key,)) for key in sorted(present - known))))
    found = []
    for group, panels in named:
        kept = [dataclasses.replace(p, keys=tuple(k for k in p.keys if k in present)) for p in panels]
        found.append((group, [panel for panel in kept if panel.keys]))
    return [(group, panels) for group, panels in found if panels]


def curve_section(runs: Mapping[str, Run]) -> Markup:
    """Return the charts of a run (name -> run), or of several over each other, with the held-out values there are.

    A quantity of several runs has a chart of its own, and each run one colour throughout.
    """
    parts = []
    for group, panels in groups([row for run in runs.values() for row in (*run.metrics, *run.evals)]):
        if len(runs) > 1:
            panels = [part for panel in panels for part in _split(panel)]
        body = tag("div", *(_chart(panel, runs) for panel in panels), class_="charts")
        if group == _OTHER:  # what has no place of its own is folded away
            parts.append(tag("details", tag("summary", f"{group} ({len(panels)})"), body))
        else:
            parts += [tag("h3", group), body]
    return join(parts)


def _split(panel: Panel) -> list[Panel]:
    """A panel for each of its quantities."""
    if len(panel.keys) == 1:
        return [panel]
    return [dataclasses.replace(panel, title=f"{panel.title}: {_short(key)}", keys=(key,)) for key in panel.keys]


def _chart(panel: Panel, runs: Mapping[str, Run]) -> Markup:
    """Some quantities of one run, or one quantity of several; a run without it keeps its place in the legend."""
    series, faint, bands, like, longest = {}, {}, {}, {}, 1
    alone = len(runs) == 1
    named = [(_short(key) if alone else name, key, run) for name, run in runs.items() for key in panel.keys]
    for name, key, run in named:
        x, y = map(drawable, column(run.metrics, key))
        width = _width(len(x), key)
        if len(x) or not alone:
            series[name] = (x, running_mean(y, width))
        if width > 1:
            faint[name], longest = (x, y), max(longest, width)
        bands |= _band(run.metrics, key, name, width) if alone else {}
    for name, key, run in named:
        x, y = column(run.evals, key)
        if len(x):
            like |= {f"{name}, {HELD_OUT}": name} if name in series else {}
            series[f"{name}, {HELD_OUT}"] = (x, y)
    means = f"the mean of {longest} steps" if alone else "means over some steps"
    notes = [f"{means}, each step faint"] if faint else []
    notes += ["the area is one standard deviation either way"] if bands else []
    axes = {"title": panel.title, "x_label": "step", "y_label": panel.unit, "log_y": panel.log and _is_wide(series)}
    return lines(series, faint=faint, bands=bands, like=like, note="; ".join(notes), **axes)


def _is_wide(series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bool:
    """The positive values span more than a factor of ten: less is read better on an even axis."""
    values = np.concatenate([y for _, y in series.values()])
    values = values[np.isfinite(values) & (values > 0)]
    return bool(len(values)) and values.max() > 10 * values.min()


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values that are numbers (fewer at the beginning), f64[N]; NaN where there are none."""
    if width == 1:
        return values
    known = np.isfinite(values)
    padded = [np.concatenate([np.zeros(width - 1), part]) for part in (np.where(known, values, 0.0), known)]
    out = np.full(len(values), np.nan)
    for start in range(0, len(values), _BLOCK):  # window by window: with running totals one huge value spoils the rest
        end = min(start + _BLOCK, len(values))
        sums, counts = (sliding_window_view(part[start : end + width - 1], width).sum(1) for part in padded)
        out[start:end] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return out


def _width(count: int, key: str) -> int:
    """How many of `count` values are averaged; 1 for few values and for what is not noisy."""
    if count < _SMOOTH_FROM or quantity(key).kind == "last":
        return 1
    return min(max(_SMOOTH_LEAST, count // _SMOOTH_PART), _SMOOTH_MOST)


def _band(metrics: Sequence[Row], key: str, name: str, width: int) -> dict[str, tuple]:
    """name -> (steps, mean reward less its standard deviation, and plus it), where the rows have one; {} without."""
    std_key = f"{_STD}{'total' if key == 'reward' else key.removeprefix(_REWARD)}"
    rows = [row for row in metrics if key in row and std_key in row]
    if not rows:
        return {}
    x, mean = column(rows, key)
    mean, std = (running_mean(drawable(v), width) for v in (mean, column(rows, std_key)[1]))
    return {name: (x, mean - std, mean + std)}


def _short(key: str) -> str:
    return key.removeprefix(_REWARD).removeprefix(_TIME).replace("_", " ")
