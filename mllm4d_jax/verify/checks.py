"""The comparisons of the parity report."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# How far apart two right computations in float32 may lie is measured: inputs are moved by SHIFT times their rounding,
# and ROUNDINGS times the SHIFTth part of what that changes is allowed. So much is the model's own amplification; noise
# of a port, and rounding coarser than float32, is nearly the same with and without SHIFT and allows next to nothing.
# Right computations came to up to half of what 8 roundings allow, over models of 3 to 12 layers with weights of up to
# 10 times the usual deviation (tests/verify/test_rounding.py draws them).
SHIFT, ROUNDINGS = 64, 16
UNDECIDED = 0.25  # the most that is ever allowed


@dataclasses.dataclass(frozen=True)
class Check:
    """A compared tensor group."""

    case: str  # e.g. "qwen3_vl/video"
    group: str  # e.g. "vision blocks"; groups of a case are listed in the order the model computes them
    error: float  # largest difference, see `Comparison`; of exact groups the number of differences
    tolerance: float  # of the tensor with that error, which must not exceed it; 0 for exact groups
    compared: int  # number of tensors or table rows
    worst: str = ""  # name of the first tensor or row beyond the tolerance, else the one with the largest error

    @property
    def passed(self) -> bool:
        # Written so that a NaN error fails.
        return bool(self.error <= self.tolerance)

    def line(self, width: int) -> str:
        """The report line."""
        verdict = "ok  " if self.passed else "FAIL"
        limit = "exact" if self.tolerance == 0 else f"tol {self.tolerance:.0e}"
        size = f"{self.error:.2e}" if self.tolerance else f"{self.error:.0f} differ"
        tail = f"  first: {self.worst}" if not self.passed else ""
        return f"{verdict}  {self.case + '  ' + self.group:<{width}}  {size:>12}  {limit:<9}  n={self.compared}{tail}"


@dataclasses.dataclass
class Comparison:
    """Collects the tensors of one group and turns them into a Check."""

    case: str
    group: str
    tolerance: float
    errors: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)  # (name, error, its tolerance)

    def add(self, name: str, error: float, moved: float = 0.0) -> float:
        """Add an error, infinite if it is no number; return its tolerance.

        Args:
          moved: by how much inputs moved by `SHIFT` rounding steps change what was compared, in the unit of the error.
            Where that would allow more than `UNDECIDED`, no more is allowed: nothing could be told.
        """
        allowed = ROUNDINGS / SHIFT * moved if np.isfinite(moved) else 0.0
        if allowed > UNDECIDED:
            name += ", which rounding alone may move as much: float32 does not decide this model"
        tolerance = max(self.tolerance, min(allowed, UNDECIDED))
        self.errors.append((name, np.inf if np.isnan(error) else error, tolerance))
        return tolerance

    def close(self, name: str, ours, recorded) -> None:
        """Add the largest absolute difference; infinite for other shapes or NaN, nothing where None is recorded."""
        pair = self._same_shape(name, ours, recorded)
        if pair is not None:
            self.add(name, _largest(pair[0] - pair[1]))

    def near(self, name: str, ours, recorded, moved) -> np.ndarray | None:
        """Add the largest difference as a share of the root mean square of its row (the last dimension).

        A row counts for at least a thousandth of that of all rows, so that one of zeros may differ by rounding.

        Args:
          ours, recorded: [..., N], or numbers. Other shapes or NaN: an infinite error. None recorded: nothing is added.
          moved: what `ours` becomes with inputs moved by `SHIFT` rounding steps, see `add`.

        Returns:
          f64[..., 1], by how much `ours` may differ; None if it could not be compared.
        """
        pair = self._same_shape(name, ours, recorded)
        if pair is None:
            return None
        ours, recorded = (x.reshape(*x.shape[:-1], -1) for x in map(np.atleast_1d, pair))
        squares = np.mean(recorded**2, -1, keepdims=True)
        scale = np.sqrt(np.maximum(squares, 1e-6 * squares.mean() if squares.size else 0.0))
        scale = np.maximum(scale, np.finfo(np.float32).tiny)
        moved = np.asarray(moved, np.float64).reshape(ours.shape)
        return self.add(name, _largest((ours - recorded) / scale), _largest((moved - ours) / scale)) * scale

    def _same_shape(self, name: str, ours, recorded) -> tuple[np.ndarray, np.ndarray] | None:
        if recorded is None:
            return None
        ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
        if ours.shape == recorded.shape:
            return ours, recorded
        self.add(f"{name} has shape {list(ours.shape)}, recorded {list(recorded.shape)}", np.inf)
        return None

    def equal(self, name: str, ours, recorded) -> None:
        """Add the number of differing elements, all if the shapes differ; nothing where None is recorded."""
        if recorded is None:
            return
        ours, recorded = np.asarray(ours), np.asarray(recorded)
        differ = int((ours != recorded).sum()) if ours.shape == recorded.shape else max(ours.size, recorded.size, 1)
        self.add(name, float(differ))

    def same(self, name: str, ours: Any, recorded: Any) -> None:
        """Add a table row: one difference unless both values are equal."""
        self.add(name, float(ours != recorded))

    def check(self) -> list[Check]:
        """[Check], or [] when nothing was compared. Its error and tolerance are those of the worst tensor."""
        if not self.errors:
            return []
        name, error, tolerance = max(self.errors, key=lambda e: e[1] / e[2] if e[2] else e[1])
        name = next((n for n, e, t in self.errors if not e <= t), name)
        error = error if self.tolerance else sum(e for _, e, _ in self.errors)
        return [Check(self.case, self.group, error, tolerance, len(self.errors), name)]


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max()) if values.size else 0.0


def chosen_alike(
    chosen: np.ndarray, recorded: np.ndarray, scores: np.ndarray, allowed: np.ndarray | None
) -> np.ndarray:
    """Return our choices, i32[..., K], but the recorded one where both are as good as rounding can tell.

    Args:
      chosen, recorded: i32[..., K] indices into the scores.
      scores: f32[..., N] that ours were chosen by.
      allowed: f64[..., 1], by how much each score may differ from the recorded one; None for not at all.
    """
    if allowed is None or chosen.shape != recorded.shape:
        return chosen
    ours, theirs = (np.take_along_axis(np.asarray(scores, np.float64), index, -1) for index in (chosen, recorded))
    return np.where(np.abs(ours - theirs) <= 2 * allowed, recorded, chosen)


class CaseChecks:
    """Collects what is compared of one case, by group."""

    def __init__(self, case: str) -> None:
        self._case = case
        self._groups: dict[str, Comparison] = {}

    def group(self, name: str, tolerance: float = 0.0) -> Comparison:
        """Return the group of that name; the first call makes it and decides its tolerance and its place."""
        return self._groups.setdefault(name, Comparison(self._case, name, tolerance))

    def checks(self) -> list[Check]:
        """Return a Check for every group in which something was compared."""
        return [check for group in self._groups.values() for check in group.check()]
