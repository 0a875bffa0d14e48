"""Two runs side by side: figures in columns, the answers on which they differ, the differences of their configs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mllm4d_jax.report import scores, summary
from mllm4d_jax.report.columns import over, quantities, tenths
from mllm4d_jax.report.page import Cell, Column, Markup, number, table, tag
from mllm4d_jax.report.reading import Place, PredictionPlace, Run


def labels(first: Run, second: Run) -> tuple[str, str]:
    """Names of two runs that tell them apart: as much of their paths as that takes."""
    paths = first.path.resolve().parts, second.path.resolve().parts
    for count in range(1, max(map(len, paths)) + 1):
        names = tuple("/".join(parts[-count:]) for parts in paths)
        if names[0] != names[1]:
            return names
    return f"{first.name} (1)", f"{second.name} (2)"  # a run beside itself


def tile_columns(runs: Mapping[str, Run]) -> Markup:
    """Return what a run's own page has at its top, what is said about it, and where the run is."""
    found = [
        dict(summary.tiles(run)) | run.facts | summary.findings(run) | {"workdir": run.home} for run in runs.values()
    ]
    names = list(dict.fromkeys(name for tiles in found for name in tiles))
    rows = [[name, *(tiles.get(name, "–") for tiles in found)] for name in names]
    return table([Column("of the whole run"), *(Column(name) for name in runs)], rows, caption="Both runs")


def figure_columns(runs: Mapping[str, Run]) -> list[Markup]:
    """Return every quantity over the last tenth of each run's steps, and of its last held-out evaluation."""
    parts = {
        "Last tenth of the steps": [tenths(run.metrics)[-1] if run.metrics else () for run in runs.values()],
        "Last evaluation on held-out prompts": [run.evals[-1:] for run in runs.values()],
    }
    heads = [Column("quantity"), *(Column(name, True) for name in runs), Column("difference", True)]
    made = []
    for caption, rows in parts.items():
        values = {name: [over(part, name) for part in rows] for part in rows for name in quantities(part)}
        cells = [[name, *map(summary.figure, two), _difference(two)] for name, two in values.items()]
        made += [table(heads, cells, caption=caption, filter=len(cells) > 8)] if cells else []
    return made


def accuracy_columns(runs: Mapping[str, Run]) -> Markup | None:
    """Accuracy of each group of questions in columns, None without any.

    The groups are those of results.json where both runs have one, else the predictions are counted.
    """
    found = [scores.accuracies(run.results) for run in runs.values()]
    heads, source = [Column("by"), Column("of")], "as results.json has it"
    if not all(found):
        counted = [scores.counts(run.predictions) for run in runs.values()]
        found = [{c.key: (float(c.n), c.accuracy) for c in counts} for counts in counted]
        heads, source = [Column("set"), *heads], "counted from the predictions"
    keys = list(dict.fromkeys(key for groups in found for key in groups))
    if not keys:
        return None
    heads += [*(Column(f"{name}, n", True) for name in runs), *(Column(f"{name}, accuracy", True) for name in runs)]
    rows = []
    for key in keys:
        pairs = [groups.get(key, (math.nan, math.nan)) for groups in found]
        shares = [share for _, share in pairs]
        cells = [number(n) for n, _ in pairs] + [number(share, 1, percent=True) for share in shares]
        rows.append([*key, *cells, _difference(shares, percent=True)])
    return table([*heads, Column("difference", True)], rows, caption=f"Accuracy, {source}", filter=len(rows) > 8)


def config_columns(runs: Mapping[str, Run]) -> Markup:
    """The keys on which the configs differ."""
    configs = [run.config for run in runs.values()]
    missing = object()
    keys = sorted({key for config in configs for key in config})
    differing = [key for key in keys if len({repr(config.get(key, missing)) for config in configs}) > 1]
    rows = [
        [tag("code", key), *(tag("code", summary.value_text(c[key])) if key in c else "–" for c in configs)]
        for key in differing
    ]
    caption = f"{len(rows)} of {len(keys)} keys differ"
    return table([Column("key"), *(Column(name) for name in runs)], rows, caption=caption, filter=True)


def crossed(first: Sequence[PredictionPlace], second: Sequence[PredictionPlace]) -> dict[tuple[str, str], list]:
    """(outcome in the first run, in the second) -> pairs of places, of the questions that both were asked."""
    others = {one.id: one for one in second if one.id}
    found: dict[tuple[str, str], list[tuple[Place, Place]]] = {}
    for one in first:
        if other := others.get(one.id):
            found.setdefault((one.outcome, other.outcome), []).append((one.place, other.place))
    return found


def crossed_table(found: Mapping[tuple[str, str], Sequence[Any]], names: Sequence[str]) -> Markup:
    """How many questions came out how in each run."""
    heads = [*(Column(name) for name in names), Column("questions", True)]
    rows = [[*outcomes, Cell(f"{len(places):,}", len(places))] for outcomes, places in sorted(found.items())]
    return table(heads, rows, caption="Questions that both runs were asked")


def differing(found: Mapping[tuple[str, str], Sequence[tuple[Place, Place]]]) -> list[tuple[Place, Place]]:
    """Places of the questions that one run got right and the other did not."""
    return [pair for outcomes, places in sorted(found.items()) if outcomes.count("correct") == 1 for pair in places]


def _difference(values: Sequence[float], *, percent: bool = False) -> Cell:
    """Second less first; a dash where one is missing."""
    change = values[1] - values[0]
    shown = f"{100 * change:+.1f} points" if percent else f"{change:+.4g}"
    return Cell(shown, change) if math.isfinite(change) else Cell("–", math.nan)
