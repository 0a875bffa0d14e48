"""One step of rows: what a host found for it, and the padded arrays with what the run must know about them."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from mllm4d_jax.processing.batch import ModelInputs
from mllm4d_jax.processing.grids import VisionGeometry, VisionInputs
from mllm4d_jax.processing.rows import Group, RowBatch, RowSizes, collate_rows


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the rows must know about the model.

    Attributes:
      geometry: of the vision tower.
      visual_token_ids: image and video placeholder ids.
      patch_size: numbers per patch.
    """

    geometry: VisionGeometry
    visual_token_ids: tuple[int, ...]
    patch_size: int


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """A batch and what the run must know about it; counts are of this host.

    Attributes:
      batch: the arrays.
      keys: record keys of the questions.
      position, rejected: the loader's state after this batch.
      tokens: real tokens in the rows, a shared prefix counted once; `slots` is B * S, the difference is padding.
      supervised: tokens that are training targets.
      visual: of the tokens, those of images and videos.
      clips: prefixes.
      rows: B.
      load_s: seconds it took to put together, waiting for workers included.
    """

    batch: RowBatch
    keys: tuple[str, ...]
    position: int
    rejected: int
    tokens: int
    slots: int
    supervised: int
    visual: int
    clips: int
    rows: int
    load_s: float


@dataclasses.dataclass(frozen=True)
class PreparedStep:
    """The rows of one host before they are padded, so that hosts can agree on sizes first.

    Attributes:
      rows: groups of each row.
      needed: the smallest sizes that hold them; the hosts pad to `RowBuckets.sizes(buckets.largest(all needed))`.
      model: facts for the layout.
      host: of this process.
      position, rejected, load_s: as in `LoadedBatch`.
    """

    rows: tuple[tuple[Group, ...], ...]
    needed: RowSizes
    model: ModelFacts
    host: int
    position: int
    rejected: int
    load_s: float

    def finish(self, sizes: RowSizes) -> LoadedBatch:
        """Pads to the sizes that all hosts agreed on.

        Indices into rows and vision features are those of the global arrays, in which the hosts' parts follow each
        other in order.

        Raises:
          ValueError: a size is too small.
        """
        started = time.perf_counter()
        batch = self._collate(sizes)
        tokens = int(np.count_nonzero(batch.inputs.segment_ids))
        visual = int(np.count_nonzero(batch.inputs.vision_index >= 0))
        groups = [g for row in self.rows for g in row]
        return LoadedBatch(
            batch=self._numbered_globally(batch, sizes),
            keys=tuple(e.key for g in groups for e in g.examples),
            position=self.position,
            rejected=self.rejected,
            tokens=tokens,
            slots=batch.inputs.tokens.size,
            supervised=int(batch.loss_weight.sum()),
            visual=visual,
            clips=len(groups),
            rows=len(self.rows),
            load_s=self.load_s + time.perf_counter() - started,
        )

    def _collate(self, sizes: RowSizes) -> RowBatch:
        geometry, ids = self.model.geometry, self.model.visual_token_ids
        if not sizes.frames or self.needed.frames:
            return collate_rows(self.rows, sizes, geometry, visual_token_ids=ids)
        # Others have clips and this host has none: the arrays must be there all the same, all of it padding.
        without = dataclasses.replace(sizes, frames=0, frame_patches=0)
        batch = collate_rows(self.rows, without, geometry, visual_token_ids=ids)
        vision = _no_vision(sizes, self.model)
        return batch._replace(inputs=batch.inputs._replace(vision=vision))

    def _numbered_globally(self, batch: RowBatch, sizes: RowSizes) -> RowBatch:
        if not self.host:
            return batch
        inputs: ModelInputs = batch.inputs
        features = sizes.frames * sizes.frame_patches // self.model.geometry.merge_size**2
        index = np.where(inputs.vision_index >= 0, inputs.vision_index + self.host * features, -1).astype(np.int32)
        loss_index = (batch.loss_index + self.host * inputs.tokens.size).astype(np.int32)
        return batch._replace(inputs=inputs._replace(vision_index=index), loss_index=loss_index)


def _no_vision(sizes: RowSizes, model: ModelFacts) -> VisionInputs:
    f, n, g = sizes.frames, sizes.frame_patches, model.geometry
    return VisionInputs(
        patches=np.zeros((f, n, model.patch_size), np.float32),
        rowcol=np.zeros((f, n, 2), np.int32),
        frame_segments=np.zeros((f, n), np.int32),
        window_segments=np.zeros((f, n), np.int32) if g.window else None,
        table_index=np.zeros((f, n, 4), np.int32) if g.position_side else None,
        table_weight=np.zeros((f, n, 4), np.float32) if g.position_side else None,
    )
