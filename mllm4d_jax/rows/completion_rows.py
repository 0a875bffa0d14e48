"""Prompts and completions as arrays: one layout for sampling, one for learning, with the same vision features.

Prompts are plain rows, padded on the right; each has its own share of the vision tower's frames, so that row b finds
its features in a block of its own. A learner's row is a prompt once, as the prefix, and some of its completions as the
branches (`rows/rows.py` describes such rows). Its features are the prompt's block, whichever rows it is in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mllm4d_jax.encode.example import Example
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.rows.batch import ModelInputs, RowLayout, collate
from mllm4d_jax.rows.rows import RowSizes


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B prompts on the host.

    Attributes:
      inputs: plain rows, padded on the right; `vision_index` counts over the features of all prompts.
      lengths: i32[B] real tokens.
      next_position: i32[B] M-RoPE position of the first token that follows.
      features: merged vision tokens that each prompt has room for, 0 without vision.
    """

    inputs: ModelInputs
    lengths: np.ndarray
    next_position: np.ndarray
    features: int


class CompletionRows(NamedTuple):
    """R rows of one prompt and up to N completions each; a pytree of NumPy arrays and the static layout.

    Attributes:
      inputs: rows without vision inputs; `vision_index` counts within the features of the row's prompt.
      prompts: i32[R] whose features a row uses; None where row r is about prompt r, for each of the batch.
      completions: i32[R, N] number of the completion in each branch.
      loss_index: i32[R, M] positions of the hidden states that predict the completions' tokens.
      loss_target: i32[R, M] these tokens, 0 where a list is padded.
      places: i32[R, N, T] entry of each token in the row's lists; M where there is none.
    """

    inputs: ModelInputs
    prompts: np.ndarray | None
    completions: np.ndarray
    loss_index: np.ndarray
    loss_target: np.ndarray
    places: np.ndarray


def needed_prompt_sizes(examples: Sequence[Example]) -> RowSizes:
    """Return the smallest sizes that hold these prompts: rows that are all prefix."""
    grids = [grid for e in examples for grid in e.grids]
    prefix = max(len(e.tokens) for e in examples)
    frames = max(sum(grid.t for grid in e.grids) for e in examples)
    frame_patches = max((grid.h * grid.w for grid in grids), default=0)
    return RowSizes(prefix, 1, 1, frames=frames, frame_patches=frame_patches, supervised=1, packed=False)


def collate_prompts(
    examples: Sequence[Example], sizes: RowSizes, geometry: VisionGeometry, visual_token_ids: Sequence[int]
) -> PromptBatch:
    """Pad prompts to one batch.

    Args:
      sizes: at least `needed_prompt_sizes`; only prefix, frames and frame patches count.

    Raises:
      ValueError: a size is too small, or placeholders and merged patches differ in number. Names the record.
    """
    length, f, n = sizes.prefix, sizes.frames, sizes.frame_patches
    inputs = collate(examples, geometry, visual_token_ids=visual_token_ids, length=length, frames=f, frame_patches=n)
    lengths = np.array([len(e.tokens) for e in examples], np.int32)
    following = lengths + np.array([e.rope_delta for e in examples], np.int32)
    return PromptBatch(inputs, lengths, following, f * n // geometry.merge_size**2)


def assign_rows(lengths: np.ndarray, per_row: int, parts: int) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Which completions share a row, and which rows a micro-batch.

    Completions of similar length are put together, so that a part is padded to what it needs and not to the longest
    completion of all. Whole prompts in one part stay in their order: each row's features are where the row is, then.

    Args:
      lengths: i32[B, G] tokens of each completion.
      per_row: completions of a row, all of one prompt; divides G, so that every prompt has as many rows.
      parts: micro-batches; divides the rows.

    Returns:
      For each part, (prompt, numbers of its completions, counted over all prompts) of every row.

    Raises:
      ValueError: completions or rows cannot be divided.
    """
    prompts, branches = lengths.shape
    if per_row < 1 or branches % per_row:
        raise ValueError(f"{branches} completions of a prompt cannot be laid out {per_row} to a row")
    total = prompts * (branches // per_row)
    if parts < 1 or total % parts:
        raise ValueError(f"{total} rows cannot be divided into {parts} micro-batches")
    rows = []
    for prompt in range(prompts):
        order = np.argsort(-lengths[prompt], kind="stable")
        for start in range(0, branches, per_row):
            chosen = np.sort(order[start : start + per_row])
            rows.append((prompt, tuple(int(prompt * branches + branch) for branch in chosen)))
    if parts > 1:
        longest = [int(lengths.reshape(-1)[list(numbers)].max()) for _, numbers in rows]
        rows = [rows[i] for i in sorted(range(total), key=lambda i: (-longest[i], i))]
    size = total // parts
    return [rows[i * size : (i + 1) * size] for i in range(parts)]


def completion_rows(
    batch: PromptBatch,
    rows: Sequence[tuple[int, tuple[int, ...]]],
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    slot: int,
    entries: int,
) -> CompletionRows:
    """Lays completions out behind their prompts.

    Args:
      batch: the prompts.
      rows: see `assign_rows`; all with equally many completions.
      tokens: i32[C, T'] of all completions; lengths: i32[C].
      slot: tokens T of a branch.
      entries: M, entries of a row's lists.

    Raises:
      ValueError: a slot or a list is too small.
    """
    r, n, p = len(rows), len(rows[0][1]), batch.inputs.tokens.shape[1]
    numbers = np.array([chosen for _, chosen in rows], np.int32)
    prompts = np.array([prompt for prompt, _ in rows], np.int32)
    count = lengths[numbers]  # i32[R, N]
    if count.max() > slot or count.sum(1).max() > entries:
        raise ValueError(
            f"completions of up to {count.max()} tokens, {count.sum(1).max()} in a row, for slots of {slot} and lists "
            f"of {entries}"
        )
    used = np.arange(slot) < count[..., None]  # bool[R, N, T]
    width = min(slot, tokens.shape[1])
    text = np.zeros((r, n, slot), np.int32)
    text[..., :width] = tokens[numbers, :width]
    text = np.where(used, text, 0)
    following = batch.next_position[prompts][:, None, None] + np.arange(slot)  # i32[R, 1, T]

    def joined(prefix: np.ndarray, branches: np.ndarray) -> np.ndarray:
        return np.concatenate([prefix, branches.reshape(r, -1)], 1).astype(np.int32)

    inner = batch.inputs.vision_index[prompts]
    inner = np.where(inner >= 0, inner - prompts[:, None] * batch.features, -1)
    places_of = np.where(used, following, 0)
    inputs = ModelInputs(
        tokens=joined(batch.inputs.tokens[prompts], text),
        positions=np.stack([joined(axis[prompts], places_of) for axis in batch.inputs.positions]),
        segment_ids=joined(batch.inputs.segment_ids[prompts], used),
        vision_index=joined(inner, np.full(used.shape, -1)),
        vision=None,
        layout=RowLayout(p, n, slot, packed=False),
    )
    same = np.array_equal(prompts, np.arange(len(batch.lengths)))
    lists = _loss_lists(batch.lengths[prompts], p, text, used, entries)
    return CompletionRows(inputs, None if same else prompts, numbers, *lists)


def _loss_lists(
    lengths: np.ndarray, prefix: int, text: np.ndarray, used: np.ndarray, entries: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`loss_index`, `loss_target` and `places` of `CompletionRows`.

    A completion's first token is predicted at the prompt's last one, every other at the token before it.

    Args:
      lengths: i32[R] tokens of each row's prompt; prefix: slots of the prefix region.
      text: i32[R, N, T] tokens; used: bool[R, N, T]; entries: M.
    """
    rows, branches, slot = text.shape
    before = prefix + np.arange(branches)[:, None] * slot + np.arange(slot) - 1
    before = np.where(np.arange(slot) == 0, (lengths - 1)[:, None, None], before)
    index, target = np.zeros((rows, entries), np.int32), np.zeros((rows, entries), np.int32)
    places = np.full(used.shape, entries, np.int32)
    for i in range(rows):
        total = int(used[i].sum())
        index[i, :total], target[i, :total] = before[i][used[i]], text[i][used[i]]
        places[i][used[i]] = np.arange(total)
    return index, target, places
