"""How sure an accuracy is, and a difference of two, when questions about one video stand or fall together.

Intervals come from the bootstrap over videos: whole videos are drawn with replacement, each with all its questions, and
an accuracy is that of all questions drawn. Drawing questions one by one would make intervals too short. Percentile
intervals of few videos are too short as well, so their percentiles are moved outwards to what Student's t asks for (the
expanded percentile interval, T. Hesterberg, 2015). Its degrees of freedom are one less than the number of equally large
videos that would do as well, (sum n)^2 / sum n^2: a few videos with most of the questions are few videos. NumPy only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
SAMPLES = 10_000
POWER = 0.8
_CELLS = 4_000_000  # of the matrix of draws that exist at a time
_NORMAL = statistics.NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A share or a difference of shares.

    Attributes:
      value: of the questions as they are; NaN without any.
      low, high: 95 % interval; NaN for fewer than two clusters.
      n: questions; clusters: videos.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int


@dataclass(frozen=True)
class McNemar:
    """Questions that only one of two runs has right (`only_first`, `only_second`), and the exact two-sided p-value.

    The test takes questions for independent: with many questions per video p comes out too small.
    """

    only_first: int
    only_second: int
    p: float


def accuracy(correct: Sequence[bool], clusters: Sequence[str], *, samples: int = SAMPLES, seed: int = 0) -> Estimate:
    """Share of right answers with its interval.

    When all answers are right, or all wrong, draws do not differ; the interval's inner end is then the share at which
    as many videos in a row without an exception have probability 2.5 %.

    Args:
      correct: bool[N]; clusters: the video of each question.
      samples: draws; seed: theirs.
    """
    hits, index, count = _checked(correct, clusters)
    if count < 2 or hits.min() == hits.max():
        return _without_spread(hits, count)
    sums = np.stack([np.bincount(index, hits, count), np.bincount(index, minlength=count)], 1)  # f64[C, 2]
    drawn = np.concatenate([(w @ sums) for w in _draws(count, samples, seed)])
    low, high = _percentiles(drawn[:, 0] / drawn[:, 1], sums[:, 1])
    return Estimate(float(hits.mean()), low, high, len(hits), count)


def macro_accuracy(
    correct: Sequence[bool],
    clusters: Sequence[str],
    groups: Sequence[str],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of the groups' accuracies, each group counting the same; groups may share videos.

    Args:
      groups: str[N], the group of each question. The other arguments are those of `accuracy`.
    """
    hits, index, count = _checked(correct, clusters)
    names, group = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(group) != len(hits):
        raise ValueError(f"{len(group)} groups for {len(hits)} answers")
    if not len(names):
        return _without_spread(hits, count)
    cells, shape = index * len(names) + group, (count, len(names))
    right = np.bincount(cells, hits, count * len(names)).reshape(shape)
    asked = np.bincount(cells, minlength=count * len(names)).reshape(shape).astype(float)
    value = float(np.mean(right.sum(0) / asked.sum(0)))
    if count < 2 or hits.min() == hits.max():
        plain = _without_spread(hits, count)
        return Estimate(value, plain.low, plain.high, plain.n, count)
    values = []
    for weights in _draws(count, samples, seed):
        n = weights @ asked
        with np.errstate(invalid="ignore"):
            shares = np.where(n > 0, (weights @ right) / n, np.nan)  # a draw may miss a small group
        values.append(np.nanmean(shares, 1))
    low, high = _percentiles(np.concatenate(values), asked.sum(1))
    return Estimate(value, low, high, len(hits), count)


def paired_difference(
    first: Sequence[bool],
    second: Sequence[bool],
    clusters: Sequence[str],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Estimate:
    """Accuracy of the second run less that of the first on the same questions, with its interval.

    An interval without 0 in it is a difference at the 5 % level.

    Args:
      first, second: bool[N], question by question. The other arguments are those of `accuracy`.
    """
    change = _change(first, second)
    _, index, count = _checked(change != 0, clusters)
    value = float(change.mean()) if len(change) else math.nan
    if count < 2:
        return Estimate(value, math.nan, math.nan, len(change), count)
    if not change.any():  # equal everywhere: what is known is that changes are rare
        bound = 1 - (0.5 - LEVEL / 2) ** (1 / count)
        return Estimate(0.0, -bound, bound, len(change), count)
    sums = np.stack([np.bincount(index, change, count), np.bincount(index, minlength=count)], 1)
    drawn = np.concatenate([(w @ sums) for w in _draws(count, samples, seed)])
    low, high = _percentiles(drawn[:, 0] / drawn[:, 1], sums[:, 1])
    return Estimate(value, low, high, len(change), count)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """The exact test of whether two runs on the same questions are equally often right when they differ."""
    change = _change(first, second)
    lost, won = int((change < 0).sum()), int((change > 0).sum())
    n, less = lost + won, min(lost, won)
    term = tail = 1
    for k in range(1, less + 1):
        term = term * (n - k + 1) // k  # n over k
        tail += term
    return McNemar(lost, won, min(1.0, 2 * tail / 2**n))  # whole numbers: exact, whatever their size


def detectable_difference(first: Sequence[bool], second: Sequence[bool], clusters: Sequence[str]) -> float:
    """The true difference that a comparison like this one would find, at the 5 % level, in 80 of 100 cases.

    From the standard error of the paired difference, videos taken as the units; NaN for fewer than two of them.
    """
    change = _change(first, second)
    _, index, count = _checked(change != 0, clusters)
    if count < 2:
        return math.nan
    residual = np.bincount(index, change - change.mean(), count)
    error = math.sqrt(count / (count - 1) * float((residual**2).sum())) / len(change)
    return (student_quantile(0.5 + LEVEL / 2, count - 1) + _NORMAL.inv_cdf(POWER)) * error


def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t, 0 < p < 1: closed for 1 and 2 degrees of freedom, else expanded around the normal's.

    The expansion (Abramowitz and Stegun 26.7.5) is within 1 % for 0.005 < p < 0.995.
    """
    if not 0 < p < 1 or freedom < 1:
        raise ValueError(f"Student's t has a quantile for 0 < p < 1 and 1 degree of freedom or more: {p}, {freedom}")
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = _NORMAL.inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))


def _checked(values: Sequence[bool], clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """(f64[N] of 0 and 1, i64[N] cluster numbers, how many clusters)."""
    hits = np.asarray(values, dtype=float)
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    if hits.ndim != 1 or len(hits) != len(index):
        raise ValueError(f"{hits.shape} answers for {len(index)} clusters")
    return hits, index, len(names)


def _change(first: Sequence[bool], second: Sequence[bool]) -> np.ndarray:
    """f64[N]: 1 where only the second is right, -1 where only the first is."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two runs are compared question by question, not {a.shape} with {b.shape}")
    return b.astype(float) - a.astype(float)


def _without_spread(hits: np.ndarray, count: int) -> Estimate:
    value = float(hits.mean()) if len(hits) else math.nan
    if count < 2:
        return Estimate(value, math.nan, math.nan, len(hits), count)
    bound = (0.5 - LEVEL / 2) ** (1 / count)
    low, high = (bound, 1.0) if value == 1 else (0.0, 1 - bound)
    return Estimate(value, low, high, len(hits), count)


def _draws(count: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """f64[B, C] blocks, `samples` rows in all: how often each cluster is in a draw of as many as there are."""
    rng, block = np.random.default_rng(seed), max(1, _CELLS // count)
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        drawn = rng.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(float)


def _percentiles(drawn: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Both ends of the expanded percentile interval from the drawn values; `sizes` are the clusters' questions."""
    count = max(2.0, float(sizes.sum() ** 2 / (sizes**2).sum()))
    spread = math.sqrt(count / (count - 1)) * student_quantile(0.5 + LEVEL / 2, max(1, round(count) - 1))
    low, high = np.quantile(drawn, [_NORMAL.cdf(-spread), _NORMAL.cdf(spread)])
    return float(low), float(high)
