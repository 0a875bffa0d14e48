"""Which branches the device works on: a rectangle of prompts and branches.

While prompts or branches wait, those that end make room for them. Then the rectangle shrinks. Sizes come from a short
ladder (powers of `ratio`), so that few shapes are ever compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

NO_PROMPT = -1
# Prompt number -> bool[G], which of its branches have not ended, begun or not; all of a prompt that is not there have.
Unfinished = Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Contents of the device's arrays."""

    rows: np.ndarray  # i32[b], prompt number of each row; rows that only fill up have NO_PROMPT or repeat one before
    branches: np.ndarray  # i32[b, g], branch number within the prompt
    used: np.ndarray  # bool[b, g], True where a branch goes on
    slots: int  # positions in the cache of each branch

    @property
    def shape(self) -> tuple[int, int, int]:
        """(prompts, branches, slots): decode steps are compiled once for each."""
        return *self.branches.shape, self.slots

    @property
    def free(self) -> list[int]:
        """Rows without a prompt."""
        return np.flatnonzero(self.rows == NO_PROMPT).tolist()

    @classmethod
    def empty(cls, rows: int, width: int, slots: int) -> Self:
        """Rows without prompts."""
        shape = rows, width
        return cls(np.full(rows, NO_PROMPT, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool), slots)

    def wider(self, width: int) -> Self:
        """Further entries in each row, none used."""
        more = ((0, 0), (0, width - self.branches.shape[1]))
        return dataclasses.replace(self, branches=np.pad(self.branches, more), used=np.pad(self.used, more))

    def placed(self, rows: Sequence[int], prompts: Sequence[int], branches: int) -> Self:
        """Prompts in rows that have none, with the first of their `branches` branches, branch n in entry n."""
        numbers, places, used = self.rows.copy(), self.branches.copy(), self.used.copy()
        numbers[rows], places[rows], used[rows] = prompts, np.arange(used.shape[1]), np.arange(used.shape[1]) < branches
        return dataclasses.replace(self, rows=numbers, branches=places, used=used)

    def refilled(self, unfinished: Unfinished) -> Self:
        """Branches that wait in the entries of those that have ended; rows of prompts that have ended are free."""
        rows, branches, used, seen = self.rows.copy(), self.branches.copy(), self.used.copy(), set()
        for i, prompt in enumerate(rows.tolist()):
            left = unfinished.get(prompt)
            if left is None or not left.any():
                rows[i], used[i] = NO_PROMPT, False
            elif prompt not in seen:  # in its first row alone, so that a row less is never one too few
                seen.add(prompt)
                used[i] &= left[np.minimum(branches[i], len(left) - 1)]
                waiting = left.copy()
                waiting[branches[i][used[i]]] = False
                entries = np.flatnonzero(~used[i])[: waiting.sum()]
                branches[i, entries], used[i, entries] = np.flatnonzero(waiting)[: len(entries)], True
        return dataclasses.replace(self, rows=rows, branches=branches, used=used)

    def places(self, wanted: Packing) -> tuple[np.ndarray, np.ndarray]:
        """Where the entries of `wanted` are in the arrays of this packing: (i32[b] rows, i32[b, g] branches).

        A branch that has not begun is nowhere, and 0 stands for it.
        """
        rows = self._sources(wanted.rows)
        columns = np.zeros(wanted.branches.shape, np.int32)
        for i, row in enumerate(rows):
            at = _first_places(self.branches[row])
            columns[i] = [at.get(branch, 0) for branch in wanted.branches[i].tolist()]
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

    def whole(self, prompts: int) -> int:
        """Rows for so many prompts, on all devices."""
        return -(-prompts // self.shards) * self.shards

    def rows(self, prompts: int, most: int) -> int:
        """Rows for so many prompts where there are `most` now."""
        return min(self.whole(self._rung(prompts)), most)

    def _rung(self, needed: int, size: int = 1) -> int:
        while size < needed:
            size *= self.ratio
        return size

    def pack(self, current: Packing, unfinished: Unfinished) -> Packing:
        """The smallest packing for what is left when nothing else comes: `current` itself unless it can shrink.

        Args:
          current: refilled; every branch that has begun and not ended is in it.
        """
        b, g, _ = current.shape
        live = [p for p in dict.fromkeys(current.rows.tolist()) if p != NO_PROMPT]
        if not self.compact or not live:
            return current
        width = min(self._rung(max(int(unfinished[p].sum()) for p in live)), g)
        shape = self.rows(len(live), b), width
        return current if shape == (b, g) else self._fill(current, unfinished, np.array(live), shape)

    def _fill(self, current: Packing, unfinished: Unfinished, live: np.ndarray, shape: tuple[int, int]) -> Packing:
        rows, width = shape
        if rows == len(current.rows):  # the prompts' caches stay where they are
            kept = current.rows
        else:
            kept = np.concatenate([live, np.repeat(live[:1], rows - len(live))]).astype(np.int32)
        branches, used, seen = np.zeros(shape, np.int32), np.zeros(shape, bool), {NO_PROMPT}
        for i, (row, source) in enumerate(zip(kept.tolist(), current._sources(kept).tolist(), strict=True)):
            going = []
            if row not in seen:
                begun = np.sort(current.branches[source][current.used[source]]).tolist()
                going = begun + [n for n in np.flatnonzero(unfinished[row]).tolist() if n not in begun]
            seen.add(row)
            going = going[:width]
            used[i, : len(going)] = True
            branches[i] = going + [int(current.branches[source, 0])] * (width - len(going))
        return Packing(kept, branches, used, current.slots)


def _first_places(numbers: np.ndarray) -> dict[int, int]:
    """Where each number stands first: entries that fill up come after the one that they repeat."""
    return {int(number): i for i, number in reversed(list(enumerate(numbers)))}
