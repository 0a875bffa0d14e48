"""The words of captions: sizes of motions, distances and places in the picture, told roughly and never in metres."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

# Of a motion, from the smallest; each is `_RATIO` times the one before it, the second begins at `_LEAST` metres.
SIZES = ("barely", "slightly", "a bit", "a little", "somewhat", "fairly", "clearly", "much", "far", "very far")
_LEAST, _RATIO = 0.1, 1.4
# Of what is how far away: from `_NEAREST` metres on, each `_STEP` times the one before it.
DISTANCES = (
    "touching", "very close", "close", "quite close", "near", "not far", "halfway", "some way off", "distant",
    "very distant", "remote", "at the back",
)  # fmt: skip
_NEAREST, _STEP = 0.9, 1.2
COLUMNS = ("at the left edge", "left", "half left", "in the middle", "half right", "right", "at the right edge")
# Aspect -> what is said of values above, below and near zero; other words than those of the questions' options.
SIGNED: Mapping[str, tuple[str, str, str]] = {
    "sideways": ("rightwards", "leftwards", "straight"),
    "in depth": ("inwards", "outwards", "abreast"),
    "gap": ("widening", "narrowing", "keeping"),
}
_NOTHING = 0.05  # metres, about what a pixel shows
MAIN = ("rightwards", "leftwards", "downwards", "upwards", "inwards", "outwards")  # in the order of CAMERA_DIRECTIONS
ASPECTS = ("mainly", *SIGNED, "in all", "distance", "first", "last")


def size_of(metres: float) -> str:
    """Return the word for the size of a motion, whatever its sign."""
    return SIZES[_step(abs(metres), _LEAST, _RATIO, len(SIZES))]


def distance_of(metres: float) -> str:
    """Return the word for how far away something is."""
    return DISTANCES[_step(metres, _NEAREST, _STEP, len(DISTANCES))]


def _step(value: float, first: float, ratio: float, count: int) -> int:
    """The number of the step that a value is on; the first one holds all below `first`."""
    return min(max(math.ceil(math.log(max(value, 1e-6) / first) / math.log(ratio)), 0), count - 1)


def signed(aspect: str, metres: float) -> str:
    """Return "<direction> <size>" of a component of a motion."""
    above, below, still = SIGNED[aspect]
    way = still if abs(metres) < _NOTHING else above if metres > 0 else below
    return f"{way} {size_of(metres)}"


def mainly(move: np.ndarray) -> str:
    """Return the word for the dominant axis of a camera's motion f64[3] in its own axes (right, down, forward)."""
    axis = int(np.abs(move).argmax())
    return MAIN[2 * axis + (move[axis] < 0)]


def column_of(x: float, width: float) -> str:
    """Return the word for a place in the picture from left to right; `x` in pixels."""
    return COLUMNS[min(max(int(x / width * len(COLUMNS)), 0), len(COLUMNS) - 1)]


def spoken_words() -> tuple[str, ...]:
    """Return all words and phrases that captions are made of, as they stand in a text (most follow a space)."""
    ways = {way for three in SIGNED.values() for way in three}
    spaced = {*ways, *MAIN, *SIZES, *DISTANCES, *COLUMNS, *ASPECTS}
    return (*(f" {word}" for word in sorted(spaced)), *ASPECTS)
