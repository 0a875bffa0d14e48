"""Clips as large as the benchmarks want them on disk, and short questions about them whose answers mean nothing: what
is timed depends on sizes alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from benchmarks.small_model import STORED
from data_prep.sample import WORLD
from data_prep.sources.frames import write_video
from data_prep.synthetic.clip import make_clip
from mllm4d_jax.qa.options import lettered, write_question

SEED = 0
_REPEATED = 3  # frames written for each that is rendered
_ASKED = (
    ("Which way does the camera move", ("right", "left", "down", "up")),
    ("How many metres does the camera move", ("1.2", "1.5", "1.9", "2.3")),
    ("Which way does the red box move over the ground", ("right", "left", "down", "up")),
    ("How many metres does the red box move over the ground", ("0.8", "1.0", "1.3", "1.6")),
)


class TaughtLetter(NamedTuple):
    """A question with its options, and the letter that is taught."""

    text: str
    letter: str


def write_clip(path: Path, number: int) -> None:
    """Write clip `number` as an mp4 of STORED size, 48 frames."""
    clip = make_clip(SEED, number, WORLD)
    frames = np.stack([cv2.resize(f, STORED[::-1], interpolation=cv2.INTER_CUBIC) for f in clip.left])
    frames = np.repeat(frames, _REPEATED, axis=0)
    write_video(path, frames, np.arange(len(frames)) / WORLD.fps, "mpeg4")


def ask(count: int, rng: np.random.Generator) -> list[TaughtLetter]:
    """Return so many questions about a clip."""
    found = []
    for n in range(count):
        question, options = _ASKED[n % len(_ASKED)]
        choices = lettered([str(option) for option in rng.permutation(options)])
        text = write_question(f"{question} between frame 0 and frame 15 of 15?", choices)
        found.append(TaughtLetter(text, str(rng.choice(list(choices)))))
    return found
