"""Scenes of random motion without pictures: for measuring the question stage, not for training."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation

from data_prep.scenes.scene import Scene, SceneObject

_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
_THINGS = ("box", "ball", "chair", "lamp", "suitcase", "bottle", "toy car", "bucket")


def random_scene(seed: int, *, frames: int = 32, objects: int = 3, points: int = 48, per_source: int = 1) -> Scene:
    """Make a clip with a translating and rotating camera and rigid objects; the world's axes are random.

    Distances spread evenly in the logarithm, about a third of the objects hardly moves, points drop out at random.

    Args:
      seed: also names the clip; clips seed // per_source share a source video.
      frames: T; points: M of each object.
    """
    rng = np.random.default_rng([seed, 0x5CE7E])
    ramp = np.linspace(0.0, 1.0, frames)[:, None]
    path = ramp * _vector(rng, 0.3, 12.0) + 0.05 * np.sin(6 * ramp + rng.uniform(0, 6, 3))
    start = Rotation.from_rotvec(rng.normal(size=3) * 2).as_matrix()
    turns = start @ Rotation.from_rotvec(_vector(rng, 0.01, 1.0) * ramp).as_matrix()
    centers = path @ start.T + rng.uniform(-20, 20, 3)
    camera_to_world = np.concatenate([turns, centers[:, :, None]], axis=2)
    made = []
    kinds = rng.permutation(len(_COLOURS) * len(_THINGS))[:objects]
    for n, kind in enumerate(kinds):
        name = f"{_COLOURS[kind % len(_COLOURS)]} {_THINGS[kind // len(_COLOURS)]}"
        place = np.array([0, 0, math.exp(rng.uniform(0.3, 3.0))]) + rng.uniform(-2, 2, 3)
        move = ramp * (_vector(rng, 0.01, 0.15) if rng.random() < 0.3 else _vector(rng, 0.4, 10.0))
        cloud = (place + rng.uniform(-0.3, 0.3, (points, 3)) + move[:, None]) @ start.T + camera_to_world[0, :, 3]
        cloud[rng.random((frames, points)) < 0.2] = np.nan
        made.append(SceneObject(f"object{n}", name, _THINGS[kind // len(_COLOURS)], cloud))
    intrinsics = np.tile(np.array([[443.4, 0, 256], [0, 443.4, 256], [0, 0, 1]]), (frames, 1, 1))
    return Scene(
        camera_to_world=camera_to_world,
        clip_id=f"random-{seed}",
        source_id=f"source-{seed // per_source}",
        intrinsics=intrinsics,
        image_size=(512, 512),
        timestamps=np.arange(frames) / 10.0,
        objects=tuple(made),
        scale="metric",
        provenance={"tool": "random_scenes", "seed": seed},
    )


def _vector(rng: np.random.Generator, shortest: float, longest: float) -> np.ndarray:
    """A vector near an axis (so that a dominant direction is common), its length log-uniform."""
    axis = np.zeros(3)
    axis[rng.integers(3)] = rng.choice((-1.0, 1.0))
    direction = axis + rng.normal(size=3) * 0.3
    return direction / np.linalg.norm(direction) * math.exp(rng.uniform(math.log(shortest), math.log(longest)))
