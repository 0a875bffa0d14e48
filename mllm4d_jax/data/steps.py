"""One step of rows: what a host has for it, and the padded arrays with what the run must know about them."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from mllm4d_jax.rows.rows import Group, RowBatch, RowSizes
from mllm4d_jax.rows.shape import RowShape


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a batch or a step holds, on this host or on all of them.

    Attributes:
      examples: questions; `clips`: prefixes.
      tokens: real tokens, a shared prefix counted once, of `slots` places; `visual` of them are of images and videos.
      supervised: tokens that are training targets.
      rejected: records that could not be used since the run began.
      gflops: 1e9 floating-point operations that the model needs for it, forward and backward, without padding.
    """

    examples: int = 0
    clips: int = 0
    tokens: int = 0
    slots: int = 0
    visual: int = 0
    supervised: int = 0
    rejected: int = 0
    gflops: int = 0


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """A batch and what the run must know about it."""

    batch: RowBatch  # the arrays
    keys: tuple[str, ...]  # record keys of the questions
    position: int  # the loader's after this batch
    counts: Counts  # of this host; without `gflops`
    load_s: float  # seconds it took to put together, waiting for workers included


@dataclasses.dataclass(frozen=True)
class PreparedStep:
    """The rows of one host before they are padded, so that hosts can agree on sizes first.

    Attributes:
      rows: groups of each row.
      needed: the smallest sizes that hold them, with slots of an allowed length; the hosts pad to `shape.sizes` of what
        holds the needs of all.
      shape: how rows are laid out.
      position, load_s: as in `LoadedBatch`; `rejected`: as in `Counts`.
    """

    rows: tuple[tuple[Group, ...], ...]
    needed: RowSizes
    shape: RowShape
    position: int
    rejected: int
    load_s: float

    def finish(self, sizes: RowSizes) -> LoadedBatch:
        """Pad to the sizes that all hosts agreed on; the global arrays are the hosts' parts one after the other.

        Raises:
          ValueError: a size is too small.
        """
        started = time.perf_counter()
        batch = self.shape.collate(self.rows, sizes, self.needed.length)
        groups = [g for row in self.rows for g in row]
        keys = tuple(e.key for g in groups for e in g.examples)
        counts = Counts(
            examples=len(keys),
            clips=len(groups),
            tokens=int(np.count_nonzero(batch.inputs.segment_ids)),
            slots=batch.inputs.tokens.size,
            visual=int(np.count_nonzero(batch.inputs.vision_index >= 0)),
            supervised=int(batch.loss_weight.sum()),
            rejected=self.rejected,
        )
        return LoadedBatch(batch, keys, self.position, counts, self.load_s + time.perf_counter() - started)
