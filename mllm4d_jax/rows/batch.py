"""Examples to static-shape model inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mllm4d_jax.encode.grids import GridLike, VisionGeometry, VisionInputs, pack_vision


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Static shape of shared-prefix rows; what lies where is described in `rows.py`.

    Attributes:
      prefix: slots of the prefix region, `[0, prefix)`.
      slots: branch slots after it.
      length: tokens of each branch slot.
    """

    prefix: int
    slots: int
    length: int

    @property
    def size(self) -> int:
        """Token slots of a row."""
        return self.prefix + self.slots * self.length


class ModelInputs(NamedTuple):
    """One batch for the model; a pytree of arrays (NumPy on the host, JAX on the device).

    Attributes:
      tokens: i32[B, S], 0 where padded.
      positions: i32[3, B, S] M-RoPE positions.
      segment_ids: i32[B, S], 0 for padding; 1 for real tokens, or the number of the clip in a shared-prefix row.
      vision_index: i32[B, S], merged vision feature that replaces the embedding, -1 for text; in a shared-prefix row
        it counts within the row's own share of the features.
      vision: inputs of the vision tower for the whole batch, None when it has no image or video.
      layout: of shared-prefix rows (see `rows.py`); None for rows that are one causal sequence.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    vision_index: np.ndarray
    vision: VisionInputs | None
    layout: RowLayout | None = None


class ExampleLike(Protocol):
    """The part of `encode.encoder.Example` that a batch needs."""

    tokens: np.ndarray
    positions: np.ndarray
    patches: np.ndarray
    grids: Sequence[GridLike]


def collate(
    examples: Sequence[ExampleLike],
    geometry: VisionGeometry,
    *,
    visual_token_ids: Sequence[int],
    length: int | None = None,
    frames: int | None = None,
    frame_patches: int | None = None,
    pad_side: str = "right",
) -> ModelInputs:
    """Pads examples to one batch.

    Args:
      examples: the rows.
      geometry: numbers of the vision tower.
      visual_token_ids: image and video placeholder ids.
      length, frames, frame_patches: static sizes S, F, L; None for exactly what the examples need.
      pad_side: "right" (training) or "left".

    Raises:
      ValueError: a static size is too small, or placeholders and merged patches differ in number.
    """
    need = max(len(e.tokens) for e in examples)
    s = need if length is None else length
    if s < need:
        raise ValueError(f"a length bucket of {s} tokens cannot hold a row of {need}")
    if pad_side not in ("left", "right"):
        raise ValueError(f"pad_side must be 'left' or 'right', got {pad_side!r}")
    b = len(examples)
    tokens, segments = np.zeros((b, s), np.int32), np.zeros((b, s), np.int32)
    index, positions = np.full((b, s), -1, np.int32), np.zeros((3, b, s), np.int32)
    grids = [g for e in examples for g in e.grids]
    vision, rows = None, np.zeros(0, np.int32)
    if grids:
        patches = np.concatenate([e.patches for e in examples if len(e.grids)])
        vision, rows = pack_vision(patches, grids, geometry, frames=frames, frame_patches=frame_patches)
    used = 0
    for i, e in enumerate(examples):
        n = len(e.tokens)
        at = slice(s - n, s) if pad_side == "left" else slice(0, n)
        tokens[i, at], segments[i, at], positions[:, i, at] = e.tokens, 1, e.positions
        visual = np.flatnonzero(np.isin(e.tokens, visual_token_ids))
        count = sum(g.t * g.h * g.w for g in e.grids) // geometry.merge_size**2
        if len(visual) != count:
            raise ValueError(f"row {i} has {len(visual)} visual placeholders for {count} merged patches")
        index[i, at][visual] = rows[used : used + count]
        used += count
    return ModelInputs(tokens, positions, segments, index, vision)
