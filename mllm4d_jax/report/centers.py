"""Predicted against true centres of an answer: how far apart they are, and a map from above."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mllm4d_jax.report.items import Centers, ShownAnswer, Vec3
from mllm4d_jax.report.maps import MapPath, top_map
from mllm4d_jax.report.page import Markup

KINDS = (("camera", "camera"), ("objects", "object"))  # (field of a ShownAnswer, what it is called)


def distances(centers: Centers) -> list[float]:
    """Metres between the predicted and the true centre of each state that has both."""
    both = zip(centers.truth, centers.predicted, strict=False)
    return [math.dist(a, b) for a, b in both if a is not None and b is not None]


def facts(item: ShownAnswer) -> list[tuple[str, str]]:
    """What is to be said of the centres: (name, text) pairs."""
    found = []
    for name, called in KINDS:
        centers = getattr(item, name)
        if not (_known(centers.truth) or _known(centers.predicted)):
            continue
        if _known(centers.truth):
            found.append((f"{called}, true", _states(centers.truth)))
        if centers.predicted:
            found.append((f"{called}, said", _states(centers.predicted)))
        apart = distances(centers)
        if apart:
            found.append((f"{called}, apart", ", ".join(f"{d:.2f} m" for d in apart)))
    return found


def center_map(item: ShownAnswer, title: str) -> Markup | None:
    """Map of the true and the predicted centres; None where neither are known."""
    paths = []
    for name, called in KINDS:
        centers = getattr(item, name)
        if _known(centers.truth):
            paths.append(MapPath(f"{called}, true", _from_above(centers.truth), camera=name == "camera"))
        if _known(centers.predicted):
            guess = _known(centers.truth)
            said = _from_above(centers.predicted)
            paths.append(MapPath(f"{called}, said", said, camera=name == "camera", guess=guess))
    if not paths:
        return None
    return top_map(paths, title=title, x_label="x, m", y_label="z, m")


def _known(states: Sequence[Vec3 | None]) -> bool:
    return any(state is not None for state in states)


def _from_above(states: Sequence[Vec3 | None]) -> np.ndarray:
    """f64[N, 2] (x, z); the world's y points down."""
    return np.array([(np.nan, np.nan) if s is None else (s[0], s[2]) for s in states], np.float64)


def _states(states: Sequence[Vec3 | None]) -> str:
    return " → ".join("none" if s is None else f"({', '.join(f'{v:.4g}' for v in s)})" for s in states)
