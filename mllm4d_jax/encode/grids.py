"""Patches of resized frames, and everything that follows from their grids alone, computed on the host.

A *grid* is (t, h, w) in patches before merging. The vision tower is shape-static: it sees frames, `[F, L]` patches of
at most L per frame, together with the index arrays made here. Frames of one video share a grid, so padding appears only
when images or videos of different size meet in one batch. Patch order inside a frame is merge-block order: the
merge_size^2 patches that become one token are consecutive, blocks in raster order (Qwen-VL processors, every release).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.processor_config import ProcessorConfig


class VisionInputs(NamedTuple):
    """Inputs of the vision tower; F frames padded to L patches.

    Attributes:
      patches: f32[F, L, P] normalised pixels, zeros where padded.
      rowcol: i32[F, L, 2] patch row and column inside the frame.
      frame_segments: i32[F, L], 1 for a patch, 0 for padding. A frame never sees another frame.
      window_segments: i32[F, L] window id + 1 (Qwen2.5-VL), 0 for padding; None without windows.
      table_index: i32[F, L, 4] rows of the learned position table (Qwen3-VL); None without a table.
      table_weight: f32[F, L, 4] bilinear weights of those rows.
    """

    patches: np.ndarray
    rowcol: np.ndarray
    frame_segments: np.ndarray
    window_segments: np.ndarray | None
    table_index: np.ndarray | None
    table_weight: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class VisionGeometry:
    """The numbers of a vision tower that its index arrays depend on.

    Attributes:
      merge_size: patches merged per side into one token.
      position_side: side of the learned position table, 0 when there is none.
      window: window side in merged tokens, 0 when attention is per frame in every block.
    """

    merge_size: int
    position_side: int
    window: int


def merge_order(h: int, w: int, merge_size: int) -> np.ndarray:
    """Row and column of each patch of an (h, w) frame in merge-block order: i32[h*w, 2]."""
    m = merge_size
    if h % m or w % m:
        raise ValueError(f"a grid of {h}x{w} patches cannot be merged in blocks of {m}x{m}")
    rows, cols = np.meshgrid(np.arange(h, dtype=np.int32), np.arange(w, dtype=np.int32), indexing="ij")
    blocks = np.stack([rows, cols], -1).reshape(h // m, m, w // m, m, 2).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(h * w, 2)


def position_taps(h: int, w: int, merge_size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear taps into a side x side position table, corners aligned, in merge-block order.

    Source coordinate of row r is `r * (side-1) / max(h-1, 1)` in fp32; the upper tap is clamped to the last row.

    Returns:
      (index i32[h*w, 4], weight f32[h*w, 4]) for the taps (lo,lo), (lo,hi), (hi,lo), (hi,hi) of (row, column).
    """

    def axis(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source = np.linspace(0, side - 1, n, dtype=np.float32) if n > 1 else np.zeros(1, np.float32)
        low = source.astype(np.int32)
        return low, np.minimum(low + 1, side - 1), source - low.astype(np.float32)

    order = merge_order(h, w, merge_size)
    (row_lo, row_hi, dh), (col_lo, col_hi, dw) = axis(h), axis(w)
    r, c = order[:, 0], order[:, 1]
    dh, dw = dh[r], dw[c]
    one = np.float32(1)
    index = np.stack([row[r] * side + col[c] for row in (row_lo, row_hi) for col in (col_lo, col_hi)], -1)
    weight = np.stack([(one - dh) * (one - dw), (one - dh) * dw, dh * (one - dw), dh * dw], -1)
    return index.astype(np.int32), weight.astype(np.float32)


def window_ids(h: int, w: int, merge_size: int, window: int) -> np.ndarray:
    """Attention window of each patch, in merge-block order: i32[h*w], windows numbered in raster order from 0.

    Windows tile the merged grid from the top left; those at the bottom and right edges are smaller (Qwen2.5-VL).
    """
    order = merge_order(h, w, merge_size) // (merge_size * window)
    per_row = -(-(w // merge_size) // window)
    return (order[:, 0] * per_row + order[:, 1]).astype(np.int32)


def window_order(h: int, w: int, merge_size: int, window: int) -> np.ndarray:
    """Merged tokens of one frame sorted by window, as the reference stores them: i32[h*w/merge_size^2].

    This port masks by window instead of permuting; the order is needed only to compare with recorded tensors.
    """
    ids = window_ids(h, w, merge_size, window)[:: merge_size**2]
    return np.argsort(ids, kind="stable").astype(np.int32)


def merged_tokens(grid: Grid, merge_size: int) -> int:
    """Number of decoder tokens of one visual item."""
    return grid.t * grid.h * grid.w // merge_size**2


def pack_vision(
    patches: np.ndarray,
    grids: Sequence[Grid],
    geometry: VisionGeometry,
    *,
    frames: int | None = None,
    frame_patches: int | None = None,
    out: VisionInputs | None = None,
) -> tuple[VisionInputs, np.ndarray]:
    """Lays flat patches out as frames and attaches the index arrays.

    Args:
      patches: f32[N, P], all items one after the other (HF layout of `pixel_values`).
      grids: the items, in the same order.
      frames: static number of frames F (at least the sum of t); None for exactly that.
      frame_patches: static patches per frame L (at least the largest h*w); None for exactly that.
      out: padding of this size to write into, such as a part of a batch; None for a new one.

    Returns:
      (inputs, rows): rows i32[sum of merged tokens] is the flat row of each merged token, in item order, in the
      `[F * L/merge_size^2, H]` output of the tower.

    Raises:
      ValueError: patches do not match the grids, or a static size is too small.
    """
    m2 = geometry.merge_size**2
    needed = sum(g.t * g.h * g.w for g in grids)
    if len(patches) != needed:
        raise ValueError(f"{len(patches)} patches do not match the grids {[(g.t, g.h, g.w) for g in grids]} ({needed})")
    total_frames, longest = sum(g.t for g in grids), max(g.h * g.w for g in grids)
    f = total_frames if frames is None else frames
    length = longest if frame_patches is None else frame_patches
    if f < total_frames or length < longest or length % m2:
        raise ValueError(
            f"a vision bucket of {f} frames x {length} patches cannot hold {total_frames} frames of up to {longest} "
            f"patches (patches per frame must also be a multiple of {m2})"
        )
    out = empty_vision(f, length, patches.shape[1], geometry) if out is None else out
    rows, frame, start = [], 0, 0
    for g in grids:
        n = g.h * g.w
        block = slice(frame, frame + g.t)
        out.patches[block, :n] = patches[start : start + g.t * n].reshape(g.t, n, -1)
        out.rowcol[block, :n] = merge_order(g.h, g.w, geometry.merge_size)
        out.frame_segments[block, :n] = 1
        if out.window_segments is not None:
            out.window_segments[block, :n] = window_ids(g.h, g.w, geometry.merge_size, geometry.window) + 1
        if out.table_index is not None:
            index, weight = position_taps(g.h, g.w, geometry.merge_size, geometry.position_side)
            out.table_index[block, :n], out.table_weight[block, :n] = index, weight
        first = np.arange(frame, frame + g.t, dtype=np.int32)[:, None] * (length // m2)
        rows.append((first + np.arange(n // m2, dtype=np.int32)).reshape(-1))
        frame, start = frame + g.t, start + g.t * n
    return out, np.concatenate(rows)


def empty_vision(frames: int, length: int, patch_dim: int, geometry: VisionGeometry) -> VisionInputs:
    """Return inputs that are all padding: `frames` frames of `length` patches."""
    table = geometry.position_side > 0
    return VisionInputs(
        patches=np.zeros((frames, length, patch_dim), np.float32),
        rowcol=np.zeros((frames, length, 2), np.int32),
        frame_segments=np.zeros((frames, length), np.int32),
        window_segments=np.zeros((frames, length), np.int32) if geometry.window else None,
        table_index=np.zeros((frames, length, 4), np.int32) if table else None,
        table_weight=np.zeros((frames, length, 4), np.float32) if table else None,
    )


def patchify(frames: np.ndarray, config: ProcessorConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Normalises frames and cuts them into patches, in merge-block order (Qwen-VL processors).

    A clip whose length is no multiple of temporal_patch_size repeats its last frame; a still image is a clip of one
    frame, so it is repeated throughout its temporal patch.

    Args:
      frames: u8[T, H, W, 3] RGB, H and W multiples of `config.factor`.

    Returns:
      (f32[t*h*w, 3*temporal_patch_size*patch_size^2], (t, h, w) in patches). A patch vector runs over channel, frame,
      pixel row, pixel column.

    Raises:
      ValueError: wrong dtype or shape, or sides that are no multiples of `config.factor`.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"expected u8[T, H, W, 3] with T > 0, got {frames.dtype}{list(frames.shape)}")
    _, height, width, _ = frames.shape
    if height % config.factor or width % config.factor:
        raise ValueError(f"frames of {height}x{width} pixels are no multiple of {config.factor}")
    tp, p, m = config.temporal_patch_size, config.patch_size, config.merge_size
    short = -len(frames) % tp
    if short:
        frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    t, h, w = len(frames) // tp, height // p, width // p
    blocks = frames.reshape(t, tp, h // m, m, p, w // m, m, p, 3)
    blocks = np.ascontiguousarray(blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)).reshape(t * h * w, 3, -1)
    patches = np.empty(blocks.shape, np.float32)
    for channel, levels in enumerate(normalised_levels(config)):
        patches[:, channel] = levels[blocks[:, channel]]
    return patches.reshape(t * h * w, -1), (t, h, w)


def unpatchify(patches: np.ndarray, grid: Grid, config: ProcessorConfig) -> np.ndarray:
    """Return the frames u8[T, H, W, 3] of which `patchify` made the patches of one image or video.

    T is a multiple of temporal_patch_size: frames that were repeated to fill a temporal patch come out as well.
    """
    tp, p, m = config.temporal_patch_size, config.patch_size, config.merge_size
    scale, shift = (np.array(x, np.float32)[:, None] * np.float32(255) for x in (config.image_std, config.image_mean))
    levels = np.rint(patches.reshape(len(patches), 3, -1) * scale + shift).astype(np.uint8)
    blocks = levels.reshape(grid.t, grid.h // m, grid.w // m, m, m, 3, tp, p, p)
    return blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(grid.t * tp, grid.h * p, grid.w * p, 3)


def normalised_levels(config: ProcessorConfig) -> np.ndarray:
    """Value of each pixel level after normalisation, `(x - 255*mean) / (255*std)` in fp32: f32[3, 256]."""
    levels = np.arange(256, dtype=np.float32)
    mean = np.array(config.image_mean, np.float32) * np.float32(255)
    std = np.array(config.image_std, np.float32) * np.float32(255)
    return (levels - mean[:, None]) / std[:, None]
