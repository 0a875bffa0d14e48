"""The clips that the report of a curation shows: their scenes, frames and chosen questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from data_prep.questions.balance import fraction
from data_prep.questions.propose import QuestionRow
from data_prep.scenes.scene import Scene
from data_prep.sources.base import ClipSource
from data_prep.store.parts import ClipRejected, PartStore
from data_prep.store.untrusted import SceneError
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.qa.errors import RecordError


@dataclass(frozen=True)
class SampledClip:
    """A clip to show.

    Attributes:
      scene: of the clip.
      frames: source frame number -> u8[H, W, 3] RGB, for the frames that questions name; the report says which of them
        are missing.
      rows: those chosen for the data set are shown first.
      quality: figures of the stereo stage, {} if there are none; None or NaN = not measured.
    """

    scene: Scene
    frames: Mapping[int, np.ndarray]
    rows: Sequence[QuestionRow]
    quality: Mapping[str, Any]


def sample_clips(
    config: ml_collections.ConfigDict, root: Path, source: ClipSource, rows: Sequence[QuestionRow]
) -> list[SampledClip]:
    """Return a few clips with scene, frames and chosen questions; the same for the same rows and seed.

    A clip whose files can no longer be used is named on the terminal and not shown.
    """
    chosen: dict[str, set[str]] = {}
    for row in rows:
        chosen.setdefault(row["part"], set()).add(row["id"])
    names = sorted(chosen, key=lambda name: fraction(config.seed, "report", name))[: config.report.clips]
    store, found = PartStore(root, seed=config.seed, config={}), []
    with DecodePool(config.decode_timeout_s) as pool:
        for name in sorted(names):
            try:
                clip = source.load(name)
                seen = pool.read(str(clip.video), SampleRule("uniform", config.questions.num_frames, None))
            except (ClipRejected, RecordError, SceneError) as error:
                print(f"report: clip {name} is not shown, and cannot be trained on: {error}")
                continue
            questions = [row for row in store.read(name).rows if row["id"] in chosen[name]]
            named = {frame for row in questions for frame in row["frames"]["source"]}
            frames = {int(n): image for n, image in zip(seen.indices, seen.frames, strict=True) if int(n) in named}
            quality = clip.scene.provenance.get("quality") or {}
            found.append(SampledClip(clip.scene, frames, questions, quality))
    return found
