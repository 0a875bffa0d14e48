"""Where things of a rendered clip are, as spatial states in camera heights: true up to a scale that is never told.

A picture of a floor says how far away a thing is in heights of the camera above it, and nothing in it says how high
that is. So a base model can learn where things are, and what it lacks is the metre.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from data_prep.captions.captions import CAMERA, Caption
from data_prep.captions.matching import worded
from data_prep.questions.names import object_names
from data_prep.questions.states import Pair, in_axes
from data_prep.questions.wording import brief_state
from data_prep.scenes.relations import LABELS, RULES, measure_object
from data_prep.scenes.scene import Scene

PLACE = "State of {o}."
THING = "the object"  # that a question is about


def placed(scene: Scene, things: Iterable[str], height: float) -> Iterator[Caption]:
    """Yield the states of each thing in the first and in the last frame, in the axes of the first one's camera.

    Args:
      things: names of objects, or the camera, whose states name no object.
      height: of the camera above the floor, metres: the unit of all centres.
    """
    ids = {name: object_id for object_id, name in object_names(scene)[0].items()}
    frames, axes = (0, scene.num_frames - 1), scene.world_to_camera[0]
    first, last = (np.array([frame]) for frame in frames)
    centers = in_axes(scene.camera_centers[list(frames)], axes) / height
    for thing in things:
        middle = (None, None)
        if thing != CAMERA:
            found = measure_object(scene, scene.object(ids[thing]), first, last, RULES)[0]
            middle = Pair(*(in_axes(end, axes)[0] / height for end in (found.start, found.end)))
        seen = zip(frames, centers, middle, strict=True)
        yield PLACE.format(o=thing), "".join(f"{brief_state(*state)}\n" for state in seen)


def placed_behind_questions(
    places: Mapping[str, str], frames: int, rng: random.Random, count: int
) -> Iterator[Caption]:
    """Ask at most `count` times for the states of what a question is about, which stands before that.

    The answer is no answer to the question: it says in camera heights where that thing is, whatever is asked of it.

    Args:
      places: name of a thing -> its states, from `placed`. frames: of the clip.
    """
    asked = [(thing, name) for thing in places for name in LABELS if name.startswith("object_") == (thing != CAMERA)]
    for thing, name in rng.sample(asked, min(count, len(asked))):
        what = PLACE.format(o=CAMERA if thing == CAMERA else THING)
        yield f"{worded(rng, name, 0, frames - 1, frames, thing)}\n{what}", places[thing]
