"""What is said about a rendered clip: its camera, its objects, in words and without figures.

Motions are those between the first and the last frame, in the axes of the camera at the first one, by the formulas of
the relation solver; only how they are told is rough (`words`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from data_prep.captions import words
from data_prep.questions.names import object_names
from data_prep.scenes.objects import project
from data_prep.scenes.relations import RULES, measure_camera, measure_object
from data_prep.scenes.scene import Scene, SceneObject

Caption = tuple[str, str]  # what is asked for, what is said

CAMERA, OBJECT = "Describe the camera.", "Describe {o}."


def captions(scene: Scene, rng: random.Random, objects: int) -> Iterator[Caption]:
    """Yield the captions of a clip: of its camera, and of some of its objects, their places and then their motions.

    Nearly every word of them hangs on what is seen, and one text says all of a thing: a small model learns to see by
    the number of clips, not by that of the words about each.

    Args:
      objects: at most so many are described, drawn at random.
    """
    first, last = np.array([0]), np.array([scene.num_frames - 1])
    camera = {name: value[0] for name, value in measure_camera(scene, first, last).items()}
    yield CAMERA, camera_caption(camera["camera_relative_direction"], camera["camera_absolute_distance"])
    named = sorted(object_names(scene)[0].items())
    for object_id, name in rng.sample(named, min(objects, len(named))):
        thing = scene.object(object_id)
        middle, values = measure_object(scene, thing, first, last, RULES)
        if middle.seen[0]:
            motion = object_caption({key: value[0] for key, value in values.items()})
            yield OBJECT.format(o=name), f"{_places(scene, thing)} {motion}"


def camera_caption(move: np.ndarray, length: float) -> str:
    """Describe a displacement f64[3] in the camera's own axes, metres."""
    parts = words.signed("sideways", move[0]), words.signed("in depth", move[2])
    return f"{words.mainly(move)} {' '.join(parts)} in all {words.size_of(length)}"


def object_caption(values: dict[str, float]) -> str:
    """Describe an object's motion; `values`: of `measure_object`, metres."""
    return " ".join(
        (
            words.signed("sideways", values["object_camera_lateral_direction"]),
            words.signed("in depth", values["object_camera_longitudinal_direction"]),
            f"in all {words.size_of(values['object_absolute_distance'])}",
            words.signed("gap", values["object_camera_relative_distance"]),
            f"distance {words.distance_of(values['object_camera_absolute_distance'])}",
        )
    )


def _places(scene: Scene, thing: SceneObject) -> str:
    """Where an object is in the first and in the last frame: its column, and how far it is from the camera."""
    told = []
    for title, frame in (("first", 0), ("last", scene.num_frames - 1)):
        distance = np.linalg.norm(thing.points[frame] - scene.camera_centers[frame], axis=1)
        told.append(f"{title} {_column(scene, thing, frame)} {words.distance_of(float(np.nanmin(distance)))}")
    return " ".join(told)


def _column(scene: Scene, thing: SceneObject, frame: int) -> str:
    pixels, _ = project(
        thing.points[frame][:, None], scene.world_to_camera[frame : frame + 1], scene.intrinsics[frame : frame + 1]
    )
    return words.column_of(float(np.nanmean(pixels[..., 0])), scene.image_size[1])
