"""The relation solver: what happened between two frames, computed from the 4D scene (MLLM-4D, section on the solver).

First the formulas, over P frame pairs of a clip at once: `i` and `j` are i64[P] frame numbers with i < j, results are
float64 metres, NaN where too few of the object's points are seen. Then `solve`, a pure function of (relation, scene,
object, i, j) for one pair. All use world->camera extrinsics. A case that no honest label fits is refused, not guessed:

- "unseen": too few of the object's points are seen;
- "no_motion": the camera moved too little for a direction;
- "mixed_axes": no axis dominates the motion;
- "near_threshold": the value is so close to the threshold that the estimate's error would decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from data_prep.scenes.scene import Scene, SceneObject

NOT_MOVING = "not moving"  # a change below `RelationRules.tau`
CAMERA_DIRECTIONS = ("right", "left", "down", "up", "forward", "backward")
# Every relation by name, with its labels; () for a distance.
LABELS: Mapping[str, tuple[str, ...]] = {
    "camera_absolute_distance": (),
    "camera_relative_direction": CAMERA_DIRECTIONS,
    "object_absolute_distance": (),
    "object_camera_absolute_distance": (),
    "object_camera_relative_distance": ("farther", "closer", NOT_MOVING),
    "object_camera_lateral_direction": ("right", "left", NOT_MOVING),
    "object_camera_longitudinal_direction": ("farther", "closer", NOT_MOVING),
}
# Classes that are refused; the others count into a relation's labels.
UNSEEN, NO_MOTION, MIXED_AXES, NEAR_THRESHOLD = -1, -2, -3, -4
_REASONS = {UNSEEN: "unseen", NO_MOTION: "no_motion", MIXED_AXES: "mixed_axes", NEAR_THRESHOLD: "near_threshold"}
POINT_SETS = ("both", "all")


@dataclasses.dataclass(frozen=True)
class RelationRules:
    """When a relation has a clear label.

    Attributes:
      min_points: points of an object that must be seen in each frame that its relation reads.
      points: "both" averages the points seen in both frames: the same part of the object at either end, so that a still
        object that is half hidden in one of them does not seem to move. "all" averages whatever is seen in each frame,
        as the paper's formula reads.
      min_motion: metres the camera must move to have a direction.
      dominance: the largest component of the camera's motion must be this many times the second.
      tau: metres; a smaller change is "not moving".
      margin: metres around tau that are refused; by default about twice the error of stereo object positions.
    """

    min_points: int = 5
    points: str = "both"
    min_motion: float = 0.2
    dominance: float = 1.5
    tau: float = 0.25
    margin: float = 0.1

    def __post_init__(self) -> None:
        if self.points not in POINT_SETS:
            raise ValueError(f"points must be one of {', '.join(POINT_SETS)}, not {self.points!r}")


RULES = RelationRules()


class Centroids(NamedTuple):
    """Object centroids of frame pairs: f64[P, 3] world at i and at j, and whether enough points were seen, bool[P]."""

    start: np.ndarray
    end: np.ndarray
    seen: np.ndarray


def measure_camera(scene: Scene, i: np.ndarray, j: np.ndarray) -> dict[str, np.ndarray]:
    """Return the values of the camera's relations: f64[P], for the direction f64[P, 3] in the axes of camera i.

    The direction is R_i (Center_j - Center_i). The paper prints R_i' (t_j - t_i), which is this only when [R|t] is
    camera->world, while its other formulas take [R|t] as world->camera.
    """
    centers = scene.camera_centers
    moves = np.einsum("pab,pb->pa", scene.world_to_camera[i, :, :3], centers[j] - centers[i])
    return {"camera_absolute_distance": np.sqrt((moves**2).sum(1)), "camera_relative_direction": moves}


def measure_object(
    scene: Scene, obj: SceneObject, i: np.ndarray, j: np.ndarray, rules: RelationRules
) -> tuple[Centroids, dict[str, np.ndarray]]:
    """Return the object's centroids and the values f64[P] of its five relations.

    An object's displacement in the axes of camera i is (R_i P_j + t_i) - (R_i P_i + t_i), where t_i cancels.
    """
    middle = _centroids(obj, i, j, rules)
    shifts = np.einsum("pab,pb->pa", scene.world_to_camera[i, :, :3], middle.end - middle.start)
    shifts = np.where(middle.seen[:, None], shifts, np.nan)
    # The object at j from camera i; then each from its own camera.
    at, camera = np.concatenate([j, i, j]), np.concatenate([i, i, j])
    across, before, after = _nearest_distances(scene, obj, at, camera, rules.min_points).reshape(3, -1)
    return middle, {
        "object_absolute_distance": np.sqrt((shifts**2).sum(1)),
        "object_camera_absolute_distance": across,
        "object_camera_relative_distance": after - before,
        "object_camera_lateral_direction": shifts[:, 0],
        "object_camera_longitudinal_direction": shifts[:, 2],
    }


def classes_of(name: str, values: np.ndarray, rules: RelationRules) -> np.ndarray:
    """Return the class i64[P] of each value of relation `name`: the index of its label, or why there is none.

    A distance is of class 0. The camera's direction is 2 * axis + (1 if negative else 0) of its dominant axis. A change
    is 0 above tau, 1 below -tau, 2 in between.
    """
    if name == "camera_relative_direction":
        return _axis_classes(values, rules)
    if not LABELS[name]:
        return np.where(np.isnan(values), UNSEEN, 0)
    size = np.abs(values)
    classes = np.where(size < rules.tau, 2, (values < 0).astype(np.int64))
    classes = np.where(np.abs(size - rules.tau) < rules.margin, NEAR_THRESHOLD, classes)
    return np.where(np.isnan(values), UNSEEN, classes)


def _axis_classes(moves: np.ndarray, rules: RelationRules) -> np.ndarray:
    size = np.abs(moves)
    axis = size.argmax(1)
    order = np.sort(size, axis=1)
    classes = 2 * axis + (np.take_along_axis(moves, axis[:, None], 1)[:, 0] < 0)
    classes = np.where(order[:, 2] >= rules.dominance * order[:, 1], classes, MIXED_AXES)
    return np.where(np.sqrt((moves**2).sum(1)) >= rules.min_motion, classes, NO_MOTION)


def _centroids(obj: SceneObject, i: np.ndarray, j: np.ndarray, rules: RelationRules) -> Centroids:
    visible = obj.seen()
    filled = np.where(visible[..., None], obj.points, 0.0)
    at_start, at_end = visible[i], visible[j]
    if rules.points == "both":
        at_start = at_end = at_start & at_end
    first, count = _mean(filled[i], at_start)
    second, end_count = _mean(filled[j], at_end)
    return Centroids(first, second, np.minimum(count, end_count) >= max(rules.min_points, 1))


def _mean(points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over axis 1 of the seen points, NaN where there are none, and their number.

    Args:
      points: f64[P, M, 3], 0 where not seen. seen: bool[P, M].
    """
    weights = seen.astype(np.float64)
    count = weights.sum(1)
    total = (weights[:, None] @ points)[:, 0]
    return np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], np.nan), count


def _nearest_distances(
    scene: Scene, obj: SceneObject, at: np.ndarray, camera: np.ndarray, min_points: int
) -> np.ndarray:
    """f64[P] from the camera centre of frame `camera` to the nearest point seen of the object at frame `at`."""
    offsets = obj.points[at] - scene.camera_centers[camera][:, None]
    x, y, z = offsets[..., 0], offsets[..., 1], offsets[..., 2]
    squares = x * x + y * y + z * z
    if not squares.shape[1]:
        return np.full(len(at), np.nan)
    enough = (~np.isnan(squares)).sum(1) >= max(min_points, 1)
    return np.where(enough, np.sqrt(np.fmin.reduce(squares, axis=1)), np.nan)


@dataclasses.dataclass(frozen=True)
class Relation:
    """One computed fact.

    Attributes:
      name: key of `LABELS`.
      value: metres; a 3-vector in camera axes for `camera_relative_direction`.
      label: one of `LABELS[name]`; for a distance the value with one decimal.
    """

    name: str
    value: float | tuple[float, float, float]
    label: str


class Refused(ValueError):
    """No label fits this case. Attribute `reason`: see the module's list."""

    def __init__(self, message: str, reason: str):
        super().__init__(f"{message} ({reason})")
        self.reason = reason


def solve(name: str, scene: Scene, obj: SceneObject | None, i: int, j: int, rules: RelationRules = RULES) -> Relation:
    """Compute one relation between frames i and j.

    camera_absolute_distance: how far the camera got, |Center_j - Center_i|. Never refused.
    camera_relative_direction: the dominant axis of R_i (Center_j - Center_i): where the camera went, as its own axes
      stood at i. Refused: "no_motion", "mixed_axes".
    object_absolute_distance: how far the object's centroid got in the world.
    object_camera_absolute_distance: from where the camera was at i to the nearest seen point of where the object is at
      j. Refused: "unseen" (at j).
    object_camera_relative_distance: whether the object's nearest seen point is farther from the camera at j than at i;
      value d_j - d_i.
    object_camera_lateral_direction: whether the object moved right or left as seen from camera i, x of the centroid at
      j minus at i. The camera's own motion plays no part: both positions are expressed in camera i.
    object_camera_longitudinal_direction: whether it moved away from or towards camera i along its viewing axis, z at j
      minus z at i.

    Args:
      name: key of `LABELS`.
      obj: the object asked about; None for the camera's relations.

    Raises:
      ValueError: not 0 <= i < j < T.
      Refused: no label fits: "unseen" for objects, "near_threshold" for their changes, and as above.
    """
    for number in (i, j):
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ValueError(f"a frame number must be a whole number, not {number!r}")
    if not 0 <= i < j < scene.num_frames:
        raise ValueError(f"clip {scene.clip_id}: frames must be 0 <= i < j < {scene.num_frames}, not i = {i}, j = {j}")
    pair = np.array([i]), np.array([j])
    measured = measure_camera(scene, *pair) if obj is None else measure_object(scene, obj, *pair, rules)[1]
    value = measured[name][0].tolist()
    kind = int(classes_of(name, measured[name], rules)[0])
    if kind == UNSEEN:
        frames = f"frame {j}" if name == "object_camera_absolute_distance" else f"frames {i} and {j}"
        text = f"object {obj.object_id!r}: fewer than {rules.min_points} points are seen at {frames}"
        raise Refused(text, _REASONS[kind])
    if kind < 0:
        raise Refused(f"{name}: {np.round(value, 3)} m has no clear label", _REASONS[kind])
    value = tuple(value) if isinstance(value, list) else value
    return Relation(name, value, LABELS[name][kind] if LABELS[name] else f"{value:.1f}")
