"""Other clips that a clip makes for nothing: seen in a mirror, and backwards in time. What is true of them follows.

In a mirror x changes its sign, in the world and in every camera; backwards, frames change their order. Both are exact:
a form's relations are those of a clip that somebody might have filmed.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from data_prep.scenes.scene import Scene, SceneObject

# Name -> whether it is mirrored, whether it runs backwards.
FORMS = {"mirrored": (True, False), "backwards": (False, True), "mirrored_backwards": (True, True)}
_FLIP = np.array([-1.0, 1.0, 1.0])
_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def scene_in_form(scene: Scene, form: str) -> Scene:
    """Return the scene of the same clip in one of `FORMS`, named `form_id`. Its source video stays the same."""
    mirrored, backwards = FORMS[form]
    poses, intrinsics, times = scene.camera_to_world, scene.intrinsics, scene.timestamps
    if mirrored:
        poses = poses * _FLIP[:, None] * np.append(_FLIP, 1.0)
        intrinsics = intrinsics.copy()
        intrinsics[:, 0, 2] = scene.image_size[1] - intrinsics[:, 0, 2]
        intrinsics[:, 0, 1] *= -1
    if backwards:
        poses, intrinsics, times = poses[::-1], intrinsics[::-1], times[0] + times[-1] - times[::-1]
    return dataclasses.replace(
        scene,
        clip_id=form_id(scene.clip_id, form),
        world_to_camera=None,
        camera_to_world=poses,
        intrinsics=intrinsics,
        timestamps=times,
        objects=tuple(_object(o, mirrored, backwards) for o in scene.objects),
        provenance={**scene.provenance, "form": form},
    )


def frames_in_form(frames: np.ndarray, form: str) -> np.ndarray:
    """Return the frames [T, H, W, ...] of the clip in a form, a view."""
    mirrored, backwards = FORMS[form]
    return frames[:: -1 if backwards else 1, :, :: -1 if mirrored else 1]


def form_id(clip_id: str, form: str) -> str:
    """Return the id of a clip's form."""
    return f"{clip_id}@{form}"


def _object(thing: SceneObject, mirrored: bool, backwards: bool) -> SceneObject:
    points, masks, order = thing.points, thing.masks, slice(None, None, -1 if backwards else 1)
    if mirrored:
        points, masks = points * _FLIP, None if masks is None else masks[:, :, ::-1]
        description = _SIDE.sub(_other_side, thing.description)  # "the cup on the left", "a right hand"
        thing = dataclasses.replace(thing, description=description)
    return dataclasses.replace(thing, points=points[order], masks=None if masks is None else masks[order])


def _other_side(found: re.Match) -> str:
    word = found[0]
    other = {"left": "right", "right": "left"}[word.lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
