"""Answer options that say nothing about the answer.

The letter and, for distances, the rank of the truth among the options are drawn uniformly before anything else. That is
not enough for distances: options drawn independently in 25-175 % of the truth betray it by their spread, because most
sets fit the bounds around one or two of their members only. `exchangeable` draws the spacing without looking at the
rank, so narrow that each of the four could be the truth, and refuses by conditions on the set alone. A refusal that
looked at the truth ("too small for distinct distractors") would make the options below its limit recognisably false.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

LETTERS = "ABCD"
_LOW, _HIGH = 0.25, 1.75  # distractors lie within these multiples of the truth (the paper's)
_NARROWEST, _WIDEST = 0.85, 0.95  # share of the permitted range (in the logarithm) that a ladder takes


def numeric_options(
    truth: float, shape: str, rng: random.Random, said: float | None = None, spacing: float = 0.0
) -> tuple[list[str], int] | None:
    """Four distances with one decimal, ascending and distinct, and the rank of the truth among them.

    Args:
      truth: metres.
      shape: key of `SHAPES`. "exchangeable": a ladder of about equal ratios, largest / smallest at most 1.75, so that
        the values alone do not tell which one is true; no option is below about 0.6 m. "independent": distractors drawn
        uniformly in the bounds, the paper's reading; allows truths from 0.4 m, and lets a reader of the options alone
        do far better than chance (`option_geometry` in `blind` measures it).
      said: metres that the solution's centres give for the same distance; the option nearest to it is the truth. None:
        the truth. Centres that are off by some share of the truth need a set whose every member, off by that share, is
        nearest to itself: again a condition on the set alone.
      spacing: ratio of neighbours of a ladder, 0 for as wide as the bounds allow. Wider than that they leave the bounds
        of the paper, but tell nothing more about the truth.

    Returns:
      None when this draw makes no fair set; another draw might.
    """
    rank = int(rng.random() * 4)
    exact = SHAPES[shape](truth, rank, rng, spacing)
    if exact is None:
        return None
    tenths = [round(n) for n in exact]
    off = 1.0 if said is None else said / truth
    if any(abs(n * off - tenths[k]) >= abs(n * off - t) for k, n in enumerate(exact) for t in tenths if t != tenths[k]):
        return None
    return [f"{n / 10:.1f}" for n in tenths], rank


def label_options(labels: Sequence[str], answer: str, rng: random.Random) -> list[str]:
    """The answer and up to three other labels, in random order.

    Of more than four labels, the others are drawn uniformly, opposites included or not: an opposite that always stood
    beside the answer would single out the pair.
    """
    others = [label for label in labels if label != answer]
    shuffle(others, rng)
    options = [answer, *others[: len(LETTERS) - 1]]
    shuffle(options, rng)
    return options


def shuffle(items: list, rng: random.Random) -> None:
    """Uniform shuffle in place, the same on every Python version (`random.shuffle` does not promise that)."""
    for n in range(len(items) - 1, 0, -1):
        k = int(rng.random() * (n + 1))
        items[n], items[k] = items[k], items[n]


def _ladder(truth: float, rank: int, rng: random.Random, spacing: float) -> list[float] | None:
    """Four distances in tenths of a metre, not rounded; so `_independent`."""
    widest = math.log(min(_HIGH, 1 / _LOW))
    a, b, c = 0.8 + 0.4 * rng.random(), 0.8 + 0.4 * rng.random(), 0.8 + 0.4 * rng.random()
    scale = widest * (_NARROWEST + (_WIDEST - _NARROWEST) * rng.random()) / (a + b + c)
    if spacing:
        scale = 3 * math.log(spacing) / (a + b + c)
    steps = (1.0, math.exp(scale * a), math.exp(scale * (a + b)), math.exp(scale * (a + b + c)))
    lowest, span = truth / steps[rank], steps[3]
    # Distinct and within bounds after rounding, whichever option is the truth: conditions on the set alone.
    gap = min(steps[1] - 1, steps[2] - steps[1], span - steps[2])
    room = math.inf if spacing else min(_HIGH - span, 1 - _LOW * span)
    if lowest * gap < 0.1 or lowest * room < 0.05:
        return None
    return [10 * lowest * step for step in steps]


def _independent(truth: float, rank: int, rng: random.Random, spacing: float) -> list[float] | None:
    center = round(10 * truth)
    bottom, top = math.ceil(10 * _LOW * truth), math.floor(10 * _HIGH * truth)
    if center - max(bottom, 1) < 3 or top - center < 3:
        return None
    chosen: set[int] = set()
    while len(chosen) < rank:
        chosen.add(max(bottom, 1) + int(rng.random() * (center - max(bottom, 1))))
    while len(chosen) < 3:
        chosen.add(center + 1 + int(rng.random() * (top - center)))
    return sorted([*chosen, 10 * truth])


SHAPES = {"exchangeable": _ladder, "independent": _independent}
