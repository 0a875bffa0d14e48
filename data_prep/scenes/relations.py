"""The relation solver: what happened between two frames, computed from the 4D scene (MLLM-4D, section on the solver).

Seven pure functions of (scene, [object,] i, j) with frame numbers i < j of the scene. All use world->camera extrinsics.
A case that no honest label fits is refused with a reason, never guessed:

- "unseen": too few of the object's points are seen;
- "no_motion": the camera moved too little for a direction;
- "mixed_axes": no axis dominates the motion;
- "near_threshold": the value is so close to the threshold that the estimate's error would decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_prep.scenes import measure
from data_prep.scenes.scene import Scene, SceneObject

MIN_POINTS = 5  # points of an object that must be seen
MIN_MOTION = 0.2  # metres the camera must move to have a direction
DOMINANCE = 1.5  # times the second largest component
TAU = 0.25  # metres; less is "not moving"
MARGIN = 0.1  # metres around TAU that are refused; about twice the error of stereo object positions

CAMERA_DIRECTIONS = ("right", "left", "down", "up", "forward", "backward")
DISTANCE_CHANGES = ("farther", "closer", "not moving")
LATERAL_DIRECTIONS = ("right", "left", "not moving")
LONGITUDINAL_DIRECTIONS = ("farther", "closer", "not moving")
# Every relation by name, with its labels; () for a distance.
LABELS: Mapping[str, tuple[str, ...]] = {
    "camera_absolute_distance": (),
    "camera_relative_direction": CAMERA_DIRECTIONS,
    "object_absolute_distance": (),
    "object_camera_absolute_distance": (),
    "object_camera_relative_distance": DISTANCE_CHANGES,
    "object_camera_lateral_direction": LATERAL_DIRECTIONS,
    "object_camera_longitudinal_direction": LONGITUDINAL_DIRECTIONS,
}


@dataclasses.dataclass(frozen=True)
class Relation:
    """One computed fact.

    Attributes:
      name: key of `LABELS`.
      value: metres; a 3-vector in camera axes for `camera_relative_direction`.
      unit: "m".
      label: one of `LABELS[name]`; for a distance the value with one decimal.
    """

    name: str
    value: float | tuple[float, float, float]
    unit: str
    label: str


class Refused(ValueError):
    """No label fits this case. Attribute `reason`: see the module's list."""

    def __init__(self, message: str, reason: str):
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.reason})"


def camera_absolute_distance(scene: Scene, i: int, j: int) -> Relation:
    """How far the camera got from i to j: |Center_j - Center_i|.

    Raises:
      ValueError: not 0 <= i < j < T.
    """
    i, j = _frames(scene, i, j)
    return _distance("camera_absolute_distance", _norm(measure.camera_displacements(scene, i, j)))


def camera_relative_direction(
    scene: Scene, i: int, j: int, *, min_motion: float = MIN_MOTION, dominance: float = DOMINANCE
) -> Relation:
    """Where the camera went, as its own axes stood at i: the dominant axis of R_i (Center_j - Center_i).

    Args:
      min_motion: metres the camera must have moved.
      dominance: the largest component must be this many times the second.

    Raises:
      ValueError: not 0 <= i < j < T.
      Refused: "no_motion", "mixed_axes".
    """
    i, j = _frames(scene, i, j)
    moves = measure.camera_displacements(scene, i, j)
    classes = measure.axis_classes(moves, min_motion=min_motion, dominance=dominance)
    return _labelled("camera_relative_direction", tuple(moves[0].tolist()), classes, f"displacement {moves[0]}")


def object_absolute_distance(
    scene: Scene, obj: SceneObject, i: int, j: int, *, points: str = "both", min_points: int = MIN_POINTS
) -> Relation:
    """How far the object's centroid got in the world from i to j.

    Args:
      points: which points the centroid averages, see `measure.centroids`.
      min_points: how many of them must be seen.

    Raises:
      ValueError: not 0 <= i < j < T.
      Refused: "unseen".
    """
    i, j = _frames(scene, i, j)
    found = _centroids(obj, i, j, points, min_points)
    return _distance("object_absolute_distance", _norm(found.end - found.start))


def object_camera_absolute_distance(
    scene: Scene, obj: SceneObject, i: int, j: int, *, min_points: int = MIN_POINTS
) -> Relation:
    """From where the camera was at i to the nearest seen point of where the object is at j.

    Raises:
      ValueError: not 0 <= i < j < T.
      Refused: "unseen" (at j).
    """
    i, j = _frames(scene, i, j)
    distance = measure.nearest_distances(scene, obj, j, i, min_points=min_points)
    _check_seen(obj, ~np.isnan(distance), j, min_points)
    return _distance("object_camera_absolute_distance", distance)


def object_camera_relative_distance(
    scene: Scene,
    obj: SceneObject,
    i: int,
    j: int,
    *,
    tau: float = TAU,
    margin: float = MARGIN,
    min_points: int = MIN_POINTS,
) -> Relation:
    """Whether the object's nearest seen point is farther from the camera at j than it was at i; value d_j - d_i.

    Args:
      tau: metres; a smaller change is "not moving".
      margin: metres around tau that are refused.
      min_points: points that must be seen at i and at j.

    Raises:
      ValueError: not 0 <= i < j < T.
      Refused: "unseen", "near_threshold".
    """
    i, j = _frames(scene, i, j)
    before = measure.nearest_distances(scene, obj, i, i, min_points=min_points)
    after = measure.nearest_distances(scene, obj, j, j, min_points=min_points)
    _check_seen(obj, ~np.isnan(before), i, min_points)
    _check_seen(obj, ~np.isnan(after), j, min_points)
    change = after - before
    classes = measure.change_classes(change, tau=tau, margin=margin)
    return _labelled("object_camera_relative_distance", float(change[0]), classes, f"change {change[0]:.3f} m")


def object_camera_lateral_direction(
    scene: Scene,
    obj: SceneObject,
    i: int,
    j: int,
    *,
    tau: float = TAU,
    margin: float = MARGIN,
    points: str = "both",
    min_points: int = MIN_POINTS,
) -> Relation:
    """Whether the object moved right or left as seen from camera i: x of the centroid at j minus at i.

    The camera's own motion plays no part: both positions are expressed in camera i.

    Args:
      tau, margin: as in `object_camera_relative_distance`.
      points, min_points: as in `object_absolute_distance`.

    Raises:
      ValueError: not 0 <= i < j < T.
      Refused: "unseen", "near_threshold".
    """
    shift = _shift(scene, obj, i, j, 0, points, min_points)
    classes = measure.change_classes(shift, tau=tau, margin=margin)
    return _labelled("object_camera_lateral_direction", float(shift[0]), classes, f"shift {shift[0]:.3f} m")


def object_camera_longitudinal_direction(
    scene: Scene,
    obj: SceneObject,
    i: int,
    j: int,
    *,
    tau: float = TAU,
    margin: float = MARGIN,
    points: str = "both",
    min_points: int = MIN_POINTS,
) -> Relation:
    """Whether the object moved away from or towards camera i along its viewing axis: z at j minus z at i.

    Args, Raises: as `object_camera_lateral_direction`.
    """
    shift = _shift(scene, obj, i, j, 2, points, min_points)
    classes = measure.change_classes(shift, tau=tau, margin=margin)
    return _labelled("object_camera_longitudinal_direction", float(shift[0]), classes, f"shift {shift[0]:.3f} m")


def _frames(scene: Scene, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    for name, number in (("i", i), ("j", j)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ValueError(f"frame {name} must be a whole number, not {number!r}")
    if not 0 <= i < j < scene.num_frames:
        raise ValueError(f"clip {scene.clip_id}: frames must be 0 <= i < j < {scene.num_frames}, not i = {i}, j = {j}")
    return np.array([i]), np.array([j])


def _centroids(obj: SceneObject, i: np.ndarray, j: np.ndarray, points: str, min_points: int) -> measure.Centroids:
    found = measure.centroids(obj, i, j, points=points, min_points=min_points)
    if not found.seen[0]:
        raise Refused(
            f"object {obj.object_id!r}: fewer than {min_points} points are seen at frames {i[0]} and {j[0]}", "unseen"
        )
    return found


def _check_seen(obj: SceneObject, seen: np.ndarray, frame: np.ndarray, min_points: int) -> None:
    if not seen[0]:
        raise Refused(
            f"object {obj.object_id!r}: fewer than {min_points} points are seen at frame {frame[0]}", "unseen"
        )


def _shift(scene: Scene, obj: SceneObject, i: int, j: int, axis: int, points: str, min_points: int) -> np.ndarray:
    first, second = _frames(scene, i, j)
    found = _centroids(obj, first, second, points, min_points)
    return measure.object_shifts(scene, found, first)[:, axis]


def _norm(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt((vectors**2).sum(-1))


def _distance(name: str, metres: np.ndarray) -> Relation:
    return Relation(name, float(metres[0]), "m", f"{metres[0]:.1f}")


def _labelled(name: str, value: float | tuple, classes: np.ndarray, what: str) -> Relation:
    if classes[0] < 0:
        raise Refused(f"{name}: {what} has no clear label", measure.REASONS[int(classes[0])])
    return Relation(name, value, "m", LABELS[name][classes[0]])
