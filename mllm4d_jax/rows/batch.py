"""Examples to static-shape model inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mllm4d_jax.encode.example import Example
from mllm4d_jax.encode.grids import VisionGeometry, VisionInputs, empty_vision, merged_tokens, pack_vision


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Static shape of shared-prefix rows; what lies where is described in `rows.py`.

    Attributes:
      prefix: slots of the prefix region, `[0, prefix)`.
      slots: branch slots after it.
      length: tokens of each branch slot.
      packed: rows may hold several clips. Where none does, lengths say what a token sees, and no mask is needed.
    """

    prefix: int
    slots: int
    length: int
    packed: bool = True

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


def collate(
    examples: Sequence[Example],
    geometry: VisionGeometry,
    *,
    visual_token_ids: Sequence[int],
    length: int | None = None,
    frames: int | None = None,
    frame_patches: int | None = None,
    pad_side: str = "right",
) -> ModelInputs:
    """Pad examples to one batch; each row has its own frames of the vision tower.

    Args:
      examples: the rows.
      geometry: numbers of the vision tower.
      visual_token_ids: image and video placeholder ids.
      length, frames, frame_patches: static sizes S, F of a row, L; None for exactly what the examples need.
      pad_side: "right" (training) or "left".

    Raises:
      ValueError: a static size is too small, or placeholders and merged patches differ in number. Names the record.
    """
    b, s = len(examples), max(len(e.tokens) for e in examples) if length is None else length
    if frames is None:
        frames = max(sum(g.t for g in e.grids) for e in examples)
    if frame_patches is None:
        frame_patches = max((g.h * g.w for e in examples for g in e.grids), default=0)
    if pad_side not in ("left", "right"):
        raise ValueError(f"pad_side must be 'left' or 'right', got {pad_side!r}")
    tokens, segments = np.zeros((b, s), np.int32), np.zeros((b, s), np.int32)
    index, positions = np.full((b, s), -1, np.int32), np.zeros((3, b, s), np.int32)
    vision, merged = pack_rows([[e] for e in examples], frames, frame_patches, geometry)
    features = frames * frame_patches // geometry.merge_size**2
    for i, e in enumerate(examples):
        n = len(e.tokens)
        if n > s:
            raise ValueError(f"{e.key}: {n} tokens for rows of {s}")
        at = slice(s - n, s) if pad_side == "left" else slice(0, n)
        tokens[i, at], segments[i, at], positions[:, i, at] = e.tokens, 1, e.positions
        index[i, at][visual_places(e, visual_token_ids, geometry)] = i * features + merged[i]
    return ModelInputs(tokens, positions, segments, index, vision)


def visual_places(
    example: Example, visual_token_ids: Sequence[int], geometry: VisionGeometry, stop: int | None = None
) -> np.ndarray:
    """Return where the visual tokens of an example are, i64[n], among all of its tokens or its first `stop`.

    Raises:
      ValueError: they and the merged patches differ in number. Names the record.
    """
    visual = np.flatnonzero(np.isin(example.tokens[:stop], visual_token_ids))
    count = sum(merged_tokens(grid, geometry.merge_size) for grid in example.grids)
    if len(visual) != count:
        raise ValueError(f"{example.key}: {len(visual)} visual placeholders for {count} merged patches")
    return visual


def pack_rows(
    rows: Sequence[Sequence[Example]],
    frames: int,
    frame_patches: int,
    geometry: VisionGeometry,
    patch_dim: int | None = None,
) -> tuple[VisionInputs | None, list[np.ndarray]]:
    """Pack the images and videos of the examples of each row, so that every row has `frames` frames of its own.

    Args:
      frame_patches: patches per frame.
      patch_dim: numbers per patch; None for those of the examples.

    Returns:
      (frames of all rows, None where a row has none; for each row i32[n], the feature of each visual token, counted
      within the row)

    Raises:
      ValueError: a size is too small, naming the row's first record; or nothing says how large patches are.
    """
    if not frames:
        for e in (e for row in rows for e in row if e.grids):
            raise ValueError(f"{e.key} has images or videos and the sizes leave no frames for them")
        return None, [np.zeros(0, np.int32)] * len(rows)
    if patch_dim is None:
        patch_dim = next((e.patches.shape[1] for row in rows for e in row), None)
        if patch_dim is None:
            raise ValueError("all rows are empty but the sizes have frames: give patch_dim")
    vision = empty_vision(len(rows) * frames, frame_patches, patch_dim, geometry)
    features = []
    for k, row in enumerate(rows):
        grids = [grid for e in row for grid in e.grids]
        if not grids:  # padding alone, so that rows without media fit the compiled step of the others
            features.append(np.zeros(0, np.int32))
            continue
        patches = [e.patches for e in row if e.grids]
        joined = patches[0] if len(patches) == 1 else np.concatenate(patches)
        mine = VisionInputs(*(None if part is None else part[k * frames : (k + 1) * frames] for part in vision))
        size = {"frames": frames, "frame_patches": frame_patches}
        try:
            features.append(pack_vision(joined, grids, geometry, **size, out=mine)[1])
        except ValueError as error:
            raise ValueError(f"the row that starts with {row[0].key}: {error}") from error
    return vision, features
