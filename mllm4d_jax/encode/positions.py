"""3-axis M-RoPE positions of a token sequence (Qwen3-VL and Qwen2.5-VL), computed on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.grids import merged_tokens
from mllm4d_jax.qa.errors import PlaceholderError

RULES = ("release", "hf517", "hf523")
Array = TypeVar("Array")  # of NumPy or JAX


def mrope_positions(
    tokens: np.ndarray,
    grids: Sequence[Grid],
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    family: str,
    second_per_grid: Sequence[float] = (),
    tokens_per_second: float = 0.0,
    rule: str = "release",
) -> tuple[np.ndarray, int]:
    """Positions on the (T, H, W) axes.

    Text advances all three axes together. A visual run starting at counter c has T = c (plus the frame's time step for
    Qwen2.5-VL), H = c + row, W = c + column over the merged grid. Qwen3-VL stores every temporal patch of a video as a
    run of its own (time is carried by the timestamp text); Qwen2.5-VL keeps the clip as one run.

    Args:
      tokens: i32[S], one unpadded sequence.
      grids: its images and videos in reading order.
      family: "qwen3_vl" or "qwen2_5_vl".
      second_per_grid: seconds per temporal patch, one number per video (Qwen2.5-VL only).
      tokens_per_second: time resolution of the T axis (Qwen2.5-VL only).
      rule: Qwen2.5-VL only. "release": T step `floor(frame * seconds * tokens_per_second)` and the next text starts
        after the largest position of the run (transformers 4.57, QwenLM code). "hf517": seconds are truncated to an
        integer before scaling and the next text ignores the T axis (transformers 5.17). "hf523": T as in "release", the
        next text ignores the T axis (transformers 5.23, after the truncation was fixed).

    Returns:
      (positions i32[3, S], delta): the k-th generated token has position S + delta + k on every axis, see
      `next_position`.

    Raises:
      PlaceholderError: runs of placeholders and grids differ in number or length.
      ValueError: unknown rule, or a video without its seconds per grid.
    """
    if rule not in RULES:
        raise ValueError(f"unknown position rule {rule!r} (known: {', '.join(RULES)})")
    tokens = np.asarray(tokens)
    kinds = np.where(tokens == image_token_id, 1, np.where(tokens == video_token_id, 2, 0))
    steps = _frame_steps(grids, family, second_per_grid, tokens_per_second, rule)
    runs = [run for g, t in zip(grids, steps, strict=True) for run in _item_runs(g, t, family, merge_size, rule)]
    positions = _place_runs(kinds, runs)
    return positions, int(next_position(positions[:, -1])) - len(tokens) if len(tokens) else 0


def next_position(last: Array) -> Array:
    """Return the position, the same on all three axes, of the token after the last one of a prompt.

    One more than that token's own, whatever came before it. So `generate` of transformers 5.17 to 5.24 goes on. It is
    no smaller than any before it under the released rule, where `generate` of transformers 4.57 went on after the
    largest of all; under "hf517" and "hf523" a clip may reach further in time than the text after it.

    Args:
      last: i32[3, ...] of NumPy or JAX, positions of last tokens. Prompts end in text; if one ends in an image or
        video, the largest axis counts.
    """
    return last.max(0) + 1


def _place_runs(kinds: np.ndarray, runs: Sequence[tuple[int, np.ndarray, int]]) -> np.ndarray:
    """Walks the runs of equal token kind (0 text, 1 image, 2 video) with one counter: i32[3, S]."""
    names = {1: "image", 2: "video"}
    positions = np.zeros((3, len(kinds)), np.int32)
    edges = (np.flatnonzero(np.diff(kinds)) + 1).tolist()
    counter, start, pending = 0, 0, list(reversed(runs))
    for stop in [*edges, len(kinds)]:
        kind, n = int(kinds[start]) if stop > start else 0, stop - start
        if kind == 0:
            positions[:, start:stop] = counter + np.arange(n)
            counter += n
        elif not pending:
            raise PlaceholderError(f"token {start} begins a visual run but all {len(runs)} of the grids are used")
        else:
            wanted, block, advance = pending.pop()
            if (kind, n) != (wanted, block.shape[1]):
                raise PlaceholderError(
                    f"token {start} begins {n} {names[kind]} placeholders where the grids ask for {block.shape[1]} "
                    f"{names[wanted]} placeholders"
                )
            positions[:, start:stop] = counter + block
            counter += advance
        start = stop
    if pending:
        used = len(runs) - len(pending)
        raise PlaceholderError(f"the text has {used} visual runs, the images and videos make {len(runs)}")
    return positions


def _frame_steps(
    grids: Sequence[Grid], family: str, second_per_grid: Sequence[float], tokens_per_second: float, rule: str
) -> list[np.ndarray]:
    """T offsets of the temporal patches of each item: i32[t] each."""
    if family == "qwen3_vl":
        return [np.zeros(g.t, np.int32) for g in grids]
    if family != "qwen2_5_vl":
        raise ValueError(f"unknown family {family!r} (known: qwen3_vl, qwen2_5_vl)")
    videos = sum(g.modality == "video" for g in grids)
    if len(second_per_grid) != videos:
        raise ValueError(f"{videos} videos need {videos} seconds-per-grid values, got {len(second_per_grid)}")
    seconds = iter(second_per_grid)
    steps = []
    for g in grids:
        if g.modality == "image":
            steps.append(np.zeros(g.t, np.int32))
            continue
        s = float(next(seconds))
        if not math.isfinite(s) or s <= 0:
            raise ValueError(f"seconds per temporal patch must be positive, got {s}")
        if rule == "hf517":
            steps.append(np.arange(g.t, dtype=np.int32) * int(tokens_per_second * int(s)))
        else:
            # fp32, multiplied in the order of the code each rule follows: any other floors differently at multiples.
            frames, s, rate = np.arange(g.t, dtype=np.float32), np.float32(s), np.float32(tokens_per_second)
            step = frames * s * rate if rule == "release" else frames * (s * rate)
            steps.append(np.floor(step).astype(np.int32))
    return steps


def _item_runs(
    grid: Grid, steps: np.ndarray, family: str, merge_size: int, rule: str
) -> list[tuple[int, np.ndarray, int]]:
    """Placeholder runs of one item: (kind 1 image / 2 video, offsets i32[3, n], advance of the counter)."""
    kind = 1 if grid.modality == "image" else 2
    h, w = grid.h // merge_size, grid.w // merge_size
    rows, cols = (a.reshape(-1) for a in np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
    n = merged_tokens(grid, merge_size) // grid.t
    time = np.repeat(steps, n)
    offsets = np.stack([time, np.tile(rows, grid.t), np.tile(cols, grid.t)]).astype(np.int32)
    advance = max(h, w)
    if family == "qwen3_vl":
        return [(kind, offsets[:, f * n : (f + 1) * n], advance) for f in range(grid.t)]
    if rule == "release":
        advance = int(offsets.max()) + 1
    return [(kind, offsets, advance)]
