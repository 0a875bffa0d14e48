"""Which branches the device works on: a rectangle of prompts and branches that shrinks as completions end.

Sizes come from a short ladder (powers of `ratio`), so that few shapes are ever compiled.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Contents of the device's arrays."""

    rows: np.ndarray  # i32[b], prompt number of each row; entries that only fill up repeat one that is there
    branches: np.ndarray  # i32[b, g], branch number within the prompt
    used: np.ndarray  # bool[b, g], False where an entry only fills up
    slots: int  # positions in the cache of each branch

    @property
    def shape(self) -> tuple[int, int, int]:
        """(prompts, branches, slots): decode steps are compiled once for each."""
        return *self.branches.shape, self.slots

    @property
    def row_grid(self) -> np.ndarray:
        """i32[b, g], prompt number of each branch."""
        return np.broadcast_to(self.rows[:, None], self.branches.shape)

    @classmethod
    def whole(cls, prompts: int, filled: int, branches: int, slots: int) -> Self:
        """All branches of `prompts` prompts, on `filled` rows (rows beyond the prompts repeat the first)."""
        real, shape = np.arange(filled) < prompts, (filled, branches)
        rows = np.where(real, np.arange(filled), 0).astype(np.int32)
        numbers = np.broadcast_to(np.arange(branches, dtype=np.int32), shape)
        return cls(rows, numbers, np.broadcast_to(real[:, None], shape), slots)

    def places(self, wanted: Packing) -> tuple[np.ndarray, np.ndarray]:
        """Where the entries of `wanted` are in the arrays of this packing: (i32[b] rows, i32[b, g] branches)."""
        rows = self._sources(wanted.rows)
        columns = np.zeros(wanted.branches.shape, np.int32)
        for i, row in enumerate(rows):
            at = _first_places(self.branches[row])
            columns[i] = [at[branch] for branch in wanted.branches[i].tolist()]
        return rows, columns

    def _sources(self, rows: np.ndarray) -> np.ndarray:
        """i32[b], where rows come from: each from its own place if none moves, else from its first place."""
        if rows is self.rows:
            return np.arange(len(rows), dtype=np.int32)
        at = _first_places(self.rows)
        return np.array([at[row] for row in rows.tolist()], np.int32)


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The sizes a packing may have."""

    ratio: int = 2  # between neighbouring sizes; small packs tighter, large compiles less
    shards: int = 1  # rows are a multiple of this (the devices they are split over)
    first_slots: int = 256  # cache positions per branch at the start; they grow by the ratio when they are full
    compact: bool = True  # drop finished branches; without it arrays keep their size

    def __post_init__(self):
        if self.ratio < 2 or self.shards < 1 or self.first_slots < 1:
            raise ValueError(f"ratio of at least 2, shards and first_slots of at least 1 are required, got {self}")

    def slots(self, needed: int, most: int) -> int:
        """Cache positions for `needed` tokens where a completion can need `most`."""
        return min(self._rung(needed, self.first_slots), most)

    def rows(self, prompts: int, most: int) -> int:
        """Rows for so many prompts where there are `most` now."""
        return min(-(-self._rung(prompts) // self.shards) * self.shards, most)

    def _rung(self, needed: int, size: int = 1) -> int:
        while size < needed:
            size *= self.ratio
        return size

    def pack(self, current: Packing, unfinished: np.ndarray, needed: int, most: int) -> Packing:
        """The packing for the next chunk: `current` itself unless it can shrink or its cache has to grow.

        Args:
          unfinished: bool[B, G] over all prompts and branches, some True; all of them are in `current`.
          needed: cache positions that the next chunk can use; most: that any later one can.
        """
        b, g, slots = current.shape
        slots = max(slots, self.slots(needed, most))
        live = np.flatnonzero(unfinished.any(1))
        rows, width = b, g
        if self.compact:
            rows, width = self.rows(len(live), b), min(self._rung(int(unfinished.sum(1).max())), g)
        if (rows, width, slots) == current.shape:
            return current
        if (rows, width) == (b, g):
            return dataclasses.replace(current, slots=slots)
        return self._fill(current, unfinished, live, (rows, width, slots))

    def _fill(self, current: Packing, unfinished: np.ndarray, live: np.ndarray, shape: tuple) -> Packing:
        rows, width, slots = shape
        if rows == len(current.rows):  # the prompts' caches stay where they are
            kept = current.rows
        else:
            kept = np.concatenate([live, np.repeat(live[:1], rows - len(live))]).astype(np.int32)
        fillers = current.branches[current._sources(kept), 0].tolist()
        branches, used = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        seen = set()
        for i, row in enumerate(kept.tolist()):
            going = [] if row in seen else np.flatnonzero(unfinished[row]).tolist()
            seen.add(row)
            used[i, : len(going)] = True
            branches[i] = going + [fillers[i]] * (width - len(going))
        return Packing(kept, branches, used, slots)


def _first_places(numbers: np.ndarray) -> dict[int, int]:
    """Where each number stands first: entries that fill up come after the one that they repeat."""
    return {int(number): i for i, number in reversed(list(enumerate(numbers)))}
