"""What is said about a rendered clip: its camera, its objects, in words and without figures.

Motions are those between the first and the last frame, in the axes of the camera at the first one, by the formulas of
the relation solver; only how they are told is rough (`words`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import numpy as np

from data_prep.captions import words
from data_prep.questions.names import object_names
from data_prep.scenes.objects import project
from data_prep.scenes.relations import RULES, measure_camera, measure_object
from data_prep.scenes.scene import Scene, SceneObject

Caption = tuple[str, str]  # what is asked for, what is said
Told = Mapping[str, str]  # aspect of a thing -> what is said of it, in the order of a caption

DESCRIBE = "Describe {o}."  # the camera or an object, wholly or one aspect of it
CAMERA = "the camera"
_TOGETHER = 3


def captions(told: Mapping[str, Told]) -> Iterator[Caption]:
    """Yield a caption of each thing.

    Nearly every word of them hangs on what is seen, and one text says all of a thing: a small model learns to see by
    the number of clips, not by that of the words about each.
    """
    for thing, parts in told.items():
        yield DESCRIBE.format(o=thing), " ".join(f"{aspect} {text}" for aspect, text in parts.items())


def aspects(told: Mapping[str, Told], rng: random.Random, count: int) -> Iterator[Caption]:
    """Ask for one to `_TOGETHER` aspects of a thing, in any order, at most `count` times.

    Within a caption the later words follow from those before them; here every aspect is also the first one.
    """
    asked = {}
    for _ in range(count):
        thing = rng.choice(list(told))
        names = rng.sample(list(told[thing]), rng.randint(1, min(_TOGETHER, len(told[thing]))))
        question = DESCRIBE.format(o=" ".join([thing, *names]))
        asked[question] = " ".join(f"{name} {told[thing][name]}" for name in names)
    yield from asked.items()


def things_told(scene: Scene, rng: random.Random, objects: int) -> dict[str, Told]:
    """Return what is said of the camera and of at most so many objects, drawn at random, by their names.

    Of an object: its places and then its motion.
    """
    first, last = np.array([0]), np.array([scene.num_frames - 1])
    camera = {name: value[0] for name, value in measure_camera(scene, first, last).items()}
    told = {CAMERA: camera_told(camera["camera_relative_direction"], camera["camera_absolute_distance"])}
    named = sorted(object_names(scene)[0].items())
    for object_id, name in rng.sample(named, min(objects, len(named))):
        thing = scene.object(object_id)
        middle, values = measure_object(scene, thing, first, last, RULES)
        if middle.seen[0]:
            motion = object_told({key: value[0] for key, value in values.items()})
            told[name] = {**_places(scene, thing), **motion}
    return told


def camera_told(move: np.ndarray, length: float) -> Told:
    """Describe a displacement f64[3] in the camera's own axes, metres."""
    return {
        "mainly": words.mainly(move),
        "sideways": words.signed("sideways", move[0]),
        "in depth": words.signed("in depth", move[2]),
        "in all": words.size_of(length),
    }


def object_told(values: Mapping[str, float]) -> Told:
    """Describe an object's motion; `values`: of `measure_object`, metres."""
    return {
        "sideways": words.signed("sideways", values["object_camera_lateral_direction"]),
        "in depth": words.signed("in depth", values["object_camera_longitudinal_direction"]),
        "in all": words.size_of(values["object_absolute_distance"]),
        "gap": words.signed("gap", values["object_camera_relative_distance"]),
        "distance": words.distance_of(values["object_camera_absolute_distance"]),
    }


def _places(scene: Scene, thing: SceneObject) -> Told:
    """Where an object is in the first and in the last frame: its column, and how far it is from the camera."""
    told = {}
    for title, frame in (("first", 0), ("last", scene.num_frames - 1)):
        distance = np.linalg.norm(thing.points[frame] - scene.camera_centers[frame], axis=1)
        told[title] = f"{_column(scene, thing, frame)} {words.distance_of(float(np.nanmin(distance)))}"
    return told


def _column(scene: Scene, thing: SceneObject, frame: int) -> str:
    pixels, _ = project(
        thing.points[frame][:, None], scene.world_to_camera[frame : frame + 1], scene.intrinsics[frame : frame + 1]
    )
    return words.column_of(float(np.nanmean(pixels[..., 0])), scene.image_size[1])
