"""Maps of a clip from above: where the camera and the objects went."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_prep.questions.propose import QuestionRow
from data_prep.scenes.scene import Scene, SceneObject, move_points
from mllm4d_jax.report.maps import MapPath, MapPoint, top_map
from mllm4d_jax.report.page import Markup

MAX_OBJECTS = 10  # drawn on a map
_SMALL = 0.5  # of the map: a shorter camera path gets a map of its own
MAP_NOTE = (
    "Seen from above, in the axes of the first camera: right to the right, forward up; metres. Open circles are "
    "starts, filled ones ends; short strokes show where the camera looks; numbers are source frames that the questions "
    "above name. An object's path is the mean of those of its points that are seen, with a gap where none is."
)


def clip_maps(scene: Scene, rows: Sequence[QuestionRow]) -> list[Markup]:
    """Draw camera and objects from above, with the frames that `rows` name marked.

    Where the camera's path is small in the map, a second one shows that path alone.
    """
    pose = scene.world_to_camera[0]
    asked = {row["object_id"] for row in rows}
    objects = sorted(scene.objects, key=lambda o: o.object_id not in asked)[:MAX_OBJECTS]
    look = scene.camera_to_world[:, :, 2] @ pose[:, :3].T  # f64[T,3] viewing directions
    camera = MapPath("camera", move_points(pose, scene.camera_centers)[:, [0, 2]], look[:, [0, 2]], camera=True)
    paths = [camera]
    for o in objects:
        name = o.description or o.category or o.object_id
        paths.append(MapPath(name, move_points(pose, _centroids(o))[:, [0, 2]]))
    frames = sorted({n for row in rows for n in row["frames"]["source"]})
    named = [_map_point(camera, 0, frame, str(frame)) for frame in frames]
    number_of = {o.object_id: n for n, o in enumerate(objects, start=1)}
    pairs = {(row["object_id"], n) for row in rows for n in row["frames"]["source"] if row["object_id"] in number_of}
    marks = [_map_point(paths[number_of[o]], number_of[o], frame, "") for o, frame in sorted(pairs)]
    left_out = len(scene.objects) - len(objects)
    note = f"scale: {scene.scale}" + (f"; {left_out} more objects are not drawn" if left_out else "")
    axes = {"x_label": "right, m", "y_label": "forward, m"}
    if _extent([camera]) > _SMALL * _extent(paths):
        return [top_map(paths, [*named, *marks], title=scene.clip_id, note=note, **axes)]
    bare = [dataclasses.replace(point, label="") for point in named]
    return [
        top_map(paths, [*bare, *marks], title=scene.clip_id, note=note, **axes),
        top_map([camera], named, title=f"{scene.clip_id}: the camera's path, larger", **axes),
    ]


def _map_point(path: MapPath, index: int, frame: int, label: str) -> MapPoint:
    x, y = path.points[frame].tolist()
    return MapPoint(x, y, label, f"{path.name} at frame {frame}: {x:.2f}, {y:.2f} m", index)


def _extent(paths: Sequence[MapPath]) -> float:
    """Metres: the longer side of the box around the paths; 0 if nothing is seen."""
    points = np.concatenate([path.points for path in paths])
    known = points[np.isfinite(points).all(1)]
    return float(np.ptp(known, axis=0).max()) if len(known) else 0.0


def _centroids(obj: SceneObject) -> np.ndarray:
    """f64[T, 3] mean of the points seen in each frame, NaN where there are none."""
    seen = obj.seen()
    total = np.where(seen[..., None], obj.points, 0.0).sum(1)
    count = seen.sum(1)[:, None]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
