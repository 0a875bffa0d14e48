"""How sure an accuracy is, and a difference of two, when questions about one video stand or fall together.

Intervals come from the bootstrap over videos: whole videos are drawn with replacement, each with all its questions, and
an accuracy is that of all questions drawn. Drawing questions one by one would make intervals too short. Percentile
intervals of few videos are too short as well, so their percentiles are moved outwards to what Student's t asks for (the
expanded percentile interval, T. Hesterberg, 2015). Its degrees of freedom are one less than the number of equally large
videos that would do as well, (sum n)^2 / sum n^2: a few videos with most of the questions are few videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8
_CELLS = 4_000_000  # of the matrix of draws that exist at a time


@dataclass(frozen=True)
class Bootstrap:
    """Number of draws of an interval, and their seed."""

    samples: int = 10_000
    seed: int = 0


DEFAULT = Bootstrap()


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


def accuracy(
    scores: Sequence[float],
    clusters: Sequence[str],
    bootstrap: Bootstrap = DEFAULT,
    groups: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
) -> Estimate:
    """Return the mean score of the answers (the share of right ones, of letters), or the mean of the groups' means.

    When all answers have the same score, draws do not differ; the interval's inner end is then the share at which as
    many videos in a row without an exception have probability 2.5 %.

    Args:
      scores: f64[N] in [0, 1], or bool[N]; clusters: the video of each question.
      groups: the group of each question; groups may share videos. () = one group.
      weights: of each group; None = every group counts the same.
    """
    groups = groups if len(groups) else [""] * len(scores)
    return _estimate(np.asarray(scores, dtype=float), 0.0, clusters, groups, bootstrap, weights)


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str], bootstrap: Bootstrap = DEFAULT
) -> Estimate:
    """Return the mean score of the second run less that of the first on the same questions, with its interval.

    An interval without 0 in it is a difference at the 5 % level.

    Args:
      first, second: f64[N] in [0, 1], question by question. The other arguments are those of `accuracy`.
    """
    change = _change(first, second)
    return _estimate(change, -1.0, clusters, [""] * len(change), bootstrap)


def mean(values: Sequence[float], clusters: Sequence[str], bootstrap: Bootstrap = DEFAULT) -> Estimate:
    """Return the mean of values of any size with its interval, which is not known where they are all the same.

    Args:
      values: f64[N]; the other arguments are those of `accuracy`.
    """
    return _estimate(np.asarray(values, dtype=float), None, clusters, [""] * len(values), bootstrap)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Test exactly whether two runs on the same questions are equally often right when they differ.

    Returns the questions that only the first has right, those that only the second has, and the two-sided p-value. The
    test takes questions for independent: with many questions per video p comes out too small.
    """
    change = _change(first, second)
    lost, won = int((change < 0).sum()), int((change > 0).sum())
    return lost, won, float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def detectable_difference(first: Sequence[float], second: Sequence[float], clusters: Sequence[str]) -> float:
    """Return the true difference that a comparison like this one would find, at the 5 % level, in 80 of 100 cases.

    From the standard error of the paired difference, videos taken as the units; NaN for fewer than two of them.
    """
    change = _change(first, second)
    index, videos = _numbered("clusters", clusters, len(change))
    count = len(videos)
    if count < 2:
        return math.nan
    residual = np.bincount(index, change - change.mean(), count)
    error = math.sqrt(count / (count - 1) * float((residual**2).sum())) / len(change)
    return float(stats.t.ppf(0.5 + LEVEL / 2, count - 1) + stats.norm.ppf(POWER)) * error


def _estimate(
    values: np.ndarray,
    least: float | None,
    clusters: Sequence[str],
    groups: Sequence[str],
    bootstrap: Bootstrap,
    weights: Mapping[str, float] | None = None,
) -> Estimate:
    """Return the mean over groups of the means of values f64[N], with its interval.

    Args:
      least: values lie in [least, 1]; None = anywhere.
    """
    if values.ndim != 1:
        raise ValueError(f"answers are a list of them, not of shape {values.shape}")
    index, videos = _numbered("clusters", clusters, len(values))
    group, names = _numbered("groups", groups, len(values))
    count, kinds = len(videos), len(names)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    share = np.array([1.0 if weights is None else weights[name] for name in names])
    cells, shape = index * kinds + group, (count, kinds)
    total = np.bincount(cells, values, count * kinds).reshape(shape)
    asked = np.bincount(cells, minlength=count * kinds).reshape(shape).astype(float)
    value = float(np.average(total.sum(0) / asked.sum(0), weights=share))
    if count < 2 or (least is None and values.min() == values.max()):
        return Estimate(value, math.nan, math.nan, len(values), count)
    if values.min() == values.max():  # draws would not differ: what is known is that exceptions are rare
        bound = 1 - (0.5 - LEVEL / 2) ** (1 / count)
        return Estimate(value, max(value - bound, least), min(value + bound, 1.0), len(values), count)
    means = []
    for drawn in _draws(count, bootstrap):
        n = drawn @ asked
        there = share * (n > 0)  # a draw may miss a small group
        means.append((there * (drawn @ total) / np.maximum(n, 1)).sum(1) / there.sum(1))
    return Estimate(value, *_percentiles(np.concatenate(means), asked.sum(1)), len(values), count)


def _numbered(what: str, labels: Sequence[str], answers: int) -> tuple[np.ndarray, Sequence[str]]:
    """(i64[N] number of each answer's label, the labels in the order of their numbers)."""
    names, index = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    if len(index) != answers:
        raise ValueError(f"{len(index)} {what} for {answers} answers")
    return index, names.tolist()


def _change(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    """f64[N]: of answers that are right or wrong 1 where only the second is right, -1 where only the first is."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two runs are compared question by question, not {a.shape} with {b.shape}")
    return b - a


def _draws(count: int, bootstrap: Bootstrap) -> Iterator[np.ndarray]:
    """f64[B, C] blocks, one row a sample: how often each cluster is in a draw of as many as there are."""
    rng, block = np.random.default_rng(bootstrap.seed), max(1, _CELLS // count)
    for start in range(0, bootstrap.samples, block):
        rows = min(block, bootstrap.samples - start)
        drawn = rng.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(float)


def _percentiles(drawn: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Both ends of the expanded percentile interval from the drawn values; `sizes` are the clusters' questions."""
    count = max(2.0, float(sizes.sum() ** 2 / (sizes**2).sum()))
    spread = math.sqrt(count / (count - 1)) * stats.t.ppf(0.5 + LEVEL / 2, max(1, round(count) - 1))
    low, high = np.quantile(drawn, stats.norm.cdf([-spread, spread]))
    return float(low), float(high)
