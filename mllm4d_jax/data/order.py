"""Which questions each step takes: a pure function of the seed and the step, whatever reads them and however well.

The unit is a *group*: up to N questions about one clip, which share its prefix. An epoch of a source takes each of its
questions once: every clip's questions are shuffled and cut into groups, then all groups are shuffled. Clips differ in
how many questions they have, and steps that differ as much would be padded to as many shapes; so every window of WINDOW
groups is put into an order in which neighbours balance each other (`even_order`).

Hosts, workers and unusable records play no part in it, so a run can be resumed on other machines, and a record that
turns out bad leaves its own place empty and moves no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

from mllm4d_jax.data.sources import Questions

BLOCK = 1000  # groups over which the sampling rates of a mixture hold exactly
ENDLESS = 1 << 48  # a length that no run comes to the end of
WINDOW = 512  # groups of a source that are put into an even order together


class OrderError(ValueError):
    """The order's settings cannot work."""


class SourceOrder:
    """The endless sequence of groups of one source.

    Attributes:
      groups: per epoch.
    """

    def __init__(self, clips: np.ndarray, per_group: int, seed: Sequence[int]) -> None:
        """
        Args:
          clips: i32 clip number of each record.
          per_group: most questions in a group.
          seed: two numbers; sources of a run must differ in it.
        """
        self._per_group, self._seed, self._clips = per_group, tuple(seed), clips
        self._by_clip = np.argsort(clips, kind="stable").astype(np.int32)
        sizes = np.unique(clips, return_counts=True)[1]
        self._first = np.concatenate([[0], np.cumsum(sizes)])  # where each clip starts in _by_clip
        self._first_group = np.concatenate([[0], np.cumsum(-(-sizes // per_group))])
        self.groups = int(self._first_group[-1])
        self._last: tuple[int, list[int]] = (-1, [])
        # Grain adds the epoch number to its seed; hashed first, neighbouring seeds do not share epochs.
        hashed = int(np.random.SeedSequence(self._seed).generate_state(1)[0])
        self._shuffled = grain.MapDataset.range(self.groups).shuffle(seed=hashed).repeat()

    def __reduce__(self):
        # Rebuilt in a worker: its source brings the clip numbers along, and pickle sends an array once.
        return type(self), (self._clips, self._per_group, self._seed)

    def __getitem__(self, position: int) -> tuple[int, ...]:
        """The records of the group at `position`, counted from the start of the run."""
        epoch, place = divmod(position, self.groups)
        number = self._window(epoch, place // WINDOW)[place % WINDOW]
        clip = int(np.searchsorted(self._first_group, number, side="right")) - 1
        part = number - int(self._first_group[clip])
        records = self._by_clip[self._first[clip] : self._first[clip + 1]]
        if len(records) > 1:
            records = np.random.default_rng((*self._seed, epoch, clip)).permutation(records)
        return tuple(int(r) for r in records[part * self._per_group : (part + 1) * self._per_group])

    def _window(self, epoch: int, window: int) -> list[int]:
        """The numbers of the groups of a window, the last one of an epoch cut short. The last one asked for is kept."""
        start = epoch * self.groups + window * WINDOW
        last = self._last  # read once: a thread of Grain and the main thread may ask at the same time
        if last[0] != start:
            end = min(start + WINDOW, (epoch + 1) * self.groups)
            numbers = np.array([self._shuffled[p] for p in range(start, end)])
            clips = np.searchsorted(self._first_group, numbers, side="right") - 1
            before = (numbers - self._first_group[clips]) * self._per_group
            sizes = np.minimum(np.diff(self._first)[clips] - before, self._per_group)
            if sizes.min() < sizes.max():
                rng = np.random.default_rng((*self._seed, epoch, window, 1))
                numbers = numbers[even_order(np.argsort(sizes, kind="stable"), rng)]
            self._last = last = (start, numbers.tolist())
        return last[1]


class Order:
    """The endless sequence of groups of a mixture.

    Every BLOCK groups hold each source as often as its rate says (rounded to one in BLOCK), in an order of their own. A
    source that is used up begins its next epoch, in a new order.
    """

    def __init__(self, sources: Sequence[np.ndarray], rates: Sequence[float], *, per_group: int, seed: int) -> None:
        """
        Args:
          sources: clip number of each record, per source.
          rates: share of the groups from each, adding up to 1.
          per_group: most questions in a group.
          seed: of everything here.

        Raises:
          OrderError: a rate below 1 / BLOCK, or `per_group` below 1.
        """
        if per_group < 1:
            raise OrderError(f"a group needs at least one question, not {per_group}")
        self.seed = seed
        self.sources = tuple(SourceOrder(clips, per_group, (seed, n)) for n, clips in enumerate(sources))
        self._records = [len(clips) for clips in sources]
        self._quota = _quota(rates)
        self._last: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __getitem__(self, position: int) -> Questions:
        """The group at `position`, counted from the start of the run over all hosts."""
        if len(self.sources) == 1:
            return Questions(0, self.sources[0][position], position)
        block, place = divmod(position, BLOCK)
        drawn = self._block(block)
        source = int(drawn[place])
        before = int(np.count_nonzero(drawn[:place] == source))
        return Questions(source, self.sources[source][block * self._quota[source] + before], position)

    def _block(self, block: int) -> np.ndarray:
        """Which source each group of a block is from: i64[BLOCK]. The last one asked for is kept."""
        last = self._last
        if last[0] != block:
            drawn = np.repeat(np.arange(len(self._quota)), self._quota)
            rng = np.random.default_rng((self.seed, len(self._quota), block))
            self._last = last = (block, rng.permutation(drawn))
        return last[1]

    def questions_until(self, position: int) -> float:
        """How many questions the first `position` groups hold: exact at the end of an epoch, the mean rate within."""
        share = [q / BLOCK for q in self._quota]
        mean = [n / order.groups for n, order in zip(self._records, self.sources, strict=True)]
        return position * sum(s * m for s, m in zip(share, mean, strict=True))


class HostOrder:
    """One host's groups of an order that the hosts share: the random-access source that Grain reads from.

    Host h of H has the groups h, h + H, ...
    """

    def __init__(self, order: Order, host: int, hosts: int) -> None:
        self._order, self._host, self._hosts = order, host, hosts

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, place: int) -> Questions:
        return self._order[place * self._hosts + self._host]


def even_order(ascending: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Puts items that are sorted by size into an order of which every stretch holds small and large ones alike.

    Of two neighbours (places 0 and 1, 2 and 3, ...) one is of the smaller half, one of the larger; of four, one of each
    quarter; and so on (a scrambled van der Corput sequence). Which of two comes first is drawn, so every item is as
    likely in one place as in another where the number of items is a power of two.
    """
    if len(ascending) < 2:
        return ascending
    half = (len(ascending) + 1) // 2
    small, large = even_order(ascending[:half], rng), even_order(ascending[half:], rng)
    paired = len(large)
    pairs = rng.permuted(np.stack([small[:paired], large], axis=1), axis=1)
    return np.concatenate([pairs.ravel(), small[paired:]])


def _quota(rates: Sequence[float]) -> list[int]:
    """How many groups of a block each source gets: rates by largest remainder."""
    exact = [rate * BLOCK for rate in rates]
    quota = [int(x) for x in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: quota[i] - exact[i])
    for i in by_remainder[: BLOCK - sum(quota)]:
        quota[i] += 1
    if min(quota) < 1:
        raise OrderError(f"data.mixture: a rate of {min(rates):.2g} is less than one group in {BLOCK}")
    return quota
