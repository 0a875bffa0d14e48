"""One step of rows: what a host found for it, and the padded arrays with what the run must know about them."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from mllm4d_jax.rows.rows import Group, RowBatch, RowSizes
from mllm4d_jax.rows.shape import RowShape


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
      needed: the smallest sizes that hold them, with slots of an allowed length; the hosts pad to
        `shape.sizes(largest(all needed))`.
      shape: how rows are laid out.
      position, rejected, load_s: as in `LoadedBatch`.
    """

    rows: tuple[tuple[Group, ...], ...]
    needed: RowSizes
    shape: RowShape
    position: int
    rejected: int
    load_s: float

    def finish(self, sizes: RowSizes) -> LoadedBatch:
        """Pads to the sizes that all hosts agreed on; the global arrays are the hosts' parts one after the other.

        Raises:
          ValueError: a size is too small.
        """
        started = time.perf_counter()
        batch = self.shape.collate(self.rows, sizes, self.needed.length)
        tokens = int(np.count_nonzero(batch.inputs.segment_ids))
        visual = int(np.count_nonzero(batch.inputs.vision_index >= 0))
        groups = [g for row in self.rows for g in row]
        return LoadedBatch(
            batch=batch,
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
