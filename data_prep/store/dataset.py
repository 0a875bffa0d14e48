"""Chosen questions and their clips' frames -> a TFDS data set, as the `curate` task writes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import ml_collections

from data_prep.store.builder import ClipExample, PartLoader, build_dataset, clips_by_split
from data_prep.store.export import MANIFEST
from data_prep.store.parts import PartStore
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule

FOLDER = "tfds"


@dataclasses.dataclass(frozen=True)
class ChosenLoader:
    """`PartLoader` that keeps the chosen questions only. Picklable.

    Attributes:
      parts: loads a clip with all of its questions.
      chosen: JSON file, clip id -> ids of the questions kept.
    """

    parts: PartLoader
    chosen: Path

    def __call__(self, clip_id: str) -> ClipExample:
        """Raises ExportError naming the clip."""
        wanted = set(json.loads(self.chosen.read_bytes())[clip_id])
        example = self.parts(clip_id)
        return dataclasses.replace(example, questions=tuple(q for q in example.questions if q["id"] in wanted))


def write_dataset(
    config: ml_collections.ConfigDict, root: Path, media_root: Path, store: PartStore, chosen: str
) -> None:
    """Writes `<root>/tfds`. Raises ExportError: it is there but made from something else, or Beam is missing."""
    options = config.tfds
    loader = PartLoader(
        store.folder,
        media_root,
        SampleRule("uniform", config.questions.num_frames, None),
        # The encoder's own rule: frames that already fit its budget are not resampled again.
        ResizeRule("per_frame", options.factor, 2, 784, options.max_pixels) if options.max_pixels else None,
        options.jpeg_quality,
    )
    wanted = {clip_id: len(ids) for clip_id, ids in json.loads((root / chosen).read_bytes()).items()}
    fingerprint = hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()
    built = build_dataset(
        root / FOLDER,
        clips_by_split(store, sorted(wanted)),
        ChosenLoader(loader, root / chosen),
        clips_per_shard=options.clips_per_shard,
        questions=wanted,
        fingerprint=f"{fingerprint} {options.max_pixels} {options.factor} {options.jpeg_quality}",
        runner=options.runner or None,
        runner_options=tuple(options.runner_options),
    )
    print(f"data set: {built.data_dir}")
