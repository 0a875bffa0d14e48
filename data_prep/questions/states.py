"""The states of a solution, camera and object centre at both frames, and what they alone say about a relation.

Reasoning is asked to derive the answer from these states, so a question whose states point to another option than its
answer is not asked. They can: centres are means of points while distances to the camera are to the nearest visible
point, and they are in the axes of the camera at the first frame seen while directions are in those of frame i.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from data_prep.scenes.relations import LABELS, RelationRules, classes_of
from data_prep.scenes.scene import move_points


class Pair(NamedTuple):
    """Centres f64[P, 3] at frame i and at frame j of P frame pairs."""

    start: np.ndarray
    end: np.ndarray


def in_axes(points: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return world points f64[N, 3] in the axes of a camera f64[3, 4], in whole millimetres."""
    return move_points(axes, points).round(3) + 0.0  # adding 0.0 turns -0.0 into 0.0


def stated(camera: Pair, thing: Pair | None = None) -> dict[str, np.ndarray]:
    """Return the value of each relation as a reader of the states computes it: f64[P], f64[P, 3] for the direction.

    Args:
      thing: the object's centres; None gives the camera's relations.
    """
    if thing is None:
        move = camera.end - camera.start
        return {"camera_absolute_distance": _length(move), "camera_relative_direction": move}
    move = thing.end - thing.start
    return {
        "object_absolute_distance": _length(move),
        "object_camera_absolute_distance": _length(thing.end - camera.start),
        "object_camera_relative_distance": _length(thing.end - camera.end) - _length(thing.start - camera.start),
        "object_camera_lateral_direction": move[:, 0],
        "object_camera_longitudinal_direction": move[:, 2],
    }


def agreeing(name: str, values: np.ndarray, classes: np.ndarray, rules: RelationRules) -> np.ndarray:
    """Return whether stated values are of the labels `classes` i64[P] of relation `name`, bool[P].

    All are for a distance, whose options decide (`options.numeric_options`). The margins of the rules are left out:
    what is stated only has to be nearer to the true label than to another.
    """
    if not LABELS[name]:
        return np.ones(len(values), bool)
    return classes_of(name, values, dataclasses.replace(rules, min_motion=0.0, dominance=1.0, margin=0.0)) == classes


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt((vectors**2).sum(1))
