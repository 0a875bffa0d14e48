"""Which reasoning paths are kept: Algorithm 1 of MLLM-4D (arXiv 2603.00515), given the rewards.

Per scenario the threshold is the mean, over the questions, of the reward of each question's best path. The paper's text
keeps a question if its best path reaches the threshold ("best_of_sample"); its pseudocode keeps every path that does
("every_path"). A question without a usable path has no best path and is not part of the mean: as a zero it would lower
the threshold for all others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

FILTERS = ("best_of_sample", "every_path")
_ROUNDING = 1e-9  # rewards that differ by less are equal: a mean of equal rewards may come out one bit higher


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question and the rewards of its usable paths, (path number, reward), in ascending order of the numbers."""

    id: str
    rewards: tuple[tuple[int, float], ...]

    @property
    def best(self) -> tuple[int, float]:
        """The path of the largest reward; of equal ones the first. Needs a usable path."""
        return max(self.rewards, key=lambda entry: entry[1])


def draw_order(ids: Iterable[str], seed: int) -> list[str]:
    """The ids in an order that depends on seed and ids alone; the first n are a random draw without replacement, and
    part of any larger one."""
    return sorted(ids, key=lambda key: (hashlib.sha256(f"{seed}\0{key}".encode()).digest(), key))


def threshold(samples: Iterable[Sample]) -> float | None:
    """Mean reward of the best paths; None if no sample has a usable path."""
    best = [sample.best[1] for sample in samples if sample.rewards]
    return math.fsum(best) / len(best) if best else None


def passing(sample: Sample, tau: float, how: str) -> list[int]:
    """Numbers of the sample's paths that the filter keeps, the best first.

    Args:
      how: one of `FILTERS`. A path of reward 0 never passes.
    """
    good = [(path, reward) for path, reward in sample.rewards if reward > 0 and reward >= tau - _ROUNDING]
    good.sort(key=lambda entry: (-entry[1], entry[0]))
    return [path for path, _ in (good[:1] if how == "best_of_sample" else good)]


def shares(scenarios: Iterable[str], total: int) -> dict[str, int]:
    """`total` in equal parts; what is left over goes to the first scenarios by name, one each."""
    names = sorted(scenarios)
    each, rest = divmod(total, len(names)) if names else (0, 0)
    return {name: each + (n < rest) for n, name in enumerate(names)}


def take(kept: Mapping[str, Sequence[int]], limit: int | None) -> set[tuple[str, int]]:
    """At most `limit` (sample id, path number) of one scenario.

    Args:
      kept: sample id -> what `passing` gave, in the order of the draw. Every sample gives its first path before any
        gives its second.
      limit: None for all.
    """
    rounds = max((len(paths) for paths in kept.values()), default=0)
    ordered = [(key, paths[n]) for n in range(rounds) for key, paths in kept.items() if n < len(paths)]
    return set(ordered if limit is None else ordered[:limit])
