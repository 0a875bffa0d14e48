"""The formulas behind the relations, over many frame pairs of a clip at once.

`i` and `j` are i64[P] frame numbers with i < j. Metres; float64; world->camera extrinsics throughout. A class is a
small integer that counts into the relation's labels, or one of the negative refusals below.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_prep.scenes.scene import Scene, SceneObject

UNSEEN, NO_MOTION, MIXED_AXES, NEAR_THRESHOLD = -1, -2, -3, -4
REASONS = {
    UNSEEN: "unseen",
    NO_MOTION: "no_motion",
    MIXED_AXES: "mixed_axes",
    NEAR_THRESHOLD: "near_threshold",
}
POINT_SETS = ("both", "all")


class Centroids(NamedTuple):
    """Object centroids of frame pairs: f64[P, 3] world at i and at j, and whether enough points were seen, bool[P]."""

    start: np.ndarray
    end: np.ndarray
    seen: np.ndarray


def camera_displacements(scene: Scene, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """How the camera moved from i to j, in the axes of camera i: R_i (Center_j - Center_i), f64[P, 3].

    The paper prints R_i' (t_j - t_i), which is this only when [R|t] is camera->world, while its other formulas take
    [R|t] as world->camera.
    """
    centers = scene.camera_centers
    return np.einsum("pab,pb->pa", scene.world_to_camera[i, :, :3], centers[j] - centers[i])


def centroids(
    obj: SceneObject, i: np.ndarray, j: np.ndarray, *, points: str = "both", min_points: int = 5
) -> Centroids:
    """Centroids of the object's points at both ends of each pair.

    Args:
      points: "both" averages the points seen in both frames: the same part of the object at either end, so that a
        still object that is half hidden in one of them does not seem to move. "all" averages whatever is seen in each
        frame, as the paper's formula reads.
      min_points: fewer than this (at either end) counts as unseen.
    """
    if points not in POINT_SETS:
        raise ValueError(f"points must be one of {', '.join(POINT_SETS)}, not {points!r}")
    visible = ~np.isnan(obj.points[..., 0])
    filled = np.where(visible[..., None], obj.points, 0.0)
    at_start, at_end = visible[i], visible[j]
    if points == "both":
        at_start = at_end = at_start & at_end
    first, count = _mean(filled[i], at_start)
    second, end_count = _mean(filled[j], at_end)
    return Centroids(first, second, np.minimum(count, end_count) >= max(min_points, 1))


def object_shifts(scene: Scene, found: Centroids, i: np.ndarray) -> np.ndarray:
    """The object's displacement in the axes of camera i, f64[P, 3].

    The difference of both centroids in camera i, (R_i P_j + t_i) - (R_i P_i + t_i); t_i cancels.
    """
    return np.einsum("pab,pb->pa", scene.world_to_camera[i, :, :3], found.end - found.start)


def nearest_distances(
    scene: Scene, obj: SceneObject, at: np.ndarray, camera: np.ndarray, *, min_points: int = 5
) -> np.ndarray:
    """Distance from the camera centre of frame `camera` to the nearest point of the object at frame `at`: f64[P].

    NaN where fewer than `min_points` points are seen at `at`.
    """
    offsets = obj.points[at] - scene.camera_centers[camera][:, None]
    x, y, z = offsets[..., 0], offsets[..., 1], offsets[..., 2]
    squares = x * x + y * y + z * z
    if not squares.shape[1]:
        return np.full(len(at), np.nan)
    enough = (~np.isnan(squares)).sum(1) >= max(min_points, 1)
    return np.where(enough, np.sqrt(np.fmin.reduce(squares, axis=1)), np.nan)


def axis_classes(moves: np.ndarray, *, min_motion: float, dominance: float) -> np.ndarray:
    """Class 2 * axis + (1 if negative else 0) of the dominant axis of each move f64[P, 3]; i64[P].

    Refused: shorter than `min_motion` metres, or the largest component is below `dominance` times the second.
    """
    size = np.abs(moves)
    axis = size.argmax(1)
    order = np.sort(size, axis=1)
    classes = 2 * axis + (np.take_along_axis(moves, axis[:, None], 1)[:, 0] < 0)
    classes = np.where(order[:, 2] >= dominance * order[:, 1], classes, MIXED_AXES)
    return np.where(np.sqrt((moves**2).sum(1)) >= min_motion, classes, NO_MOTION)


def change_classes(change: np.ndarray, *, tau: float, margin: float) -> np.ndarray:
    """Class 0 where change > tau, 1 where < -tau, 2 in between; refused within `margin` of ±tau or NaN; i64[P]."""
    size = np.abs(change)
    classes = np.where(size < tau, 2, (change < 0).astype(np.int64))
    classes = np.where(np.abs(size - tau) < margin, NEAR_THRESHOLD, classes)
    return np.where(np.isnan(change), UNSEEN, classes)


def _mean(points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over axis 1 of the seen points, NaN where there are none, and their number.

    Args:
      points: f64[P, M, 3], 0 where not seen. seen: bool[P, M].
    """
    weights = seen.astype(np.float64)
    count = weights.sum(1)
    total = (weights[:, None] @ points)[:, 0]
    return np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], np.nan), count
