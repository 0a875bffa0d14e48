"""The comparisons of the parity report."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Check:
    """A compared tensor group."""

    case: str  # e.g. "qwen3_vl/video"
    group: str  # e.g. "vision blocks"; groups of a case are listed in the order the model computes them
    error: float  # largest absolute (of gradients: relative) difference; of exact groups the number of differences
    tolerance: float  # the error must not exceed it; 0 for exact groups
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
    errors: list[tuple[str, float]] = dataclasses.field(default_factory=list)

    def close(self, name: str, ours, recorded) -> None:
        """Add the largest absolute difference; infinite for other shapes or NaN, nothing where None is recorded."""
        if recorded is None:
            return
        ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
        if ours.shape != recorded.shape:
            self.errors.append((f"{name} has shape {list(ours.shape)}, recorded {list(recorded.shape)}", np.inf))
            return
        error = float(np.abs(ours - recorded).max()) if ours.size else 0.0
        self.errors.append((name, np.inf if np.isnan(error) else error))

    def equal(self, name: str, ours, recorded) -> None:
        """Add the number of differing elements, all if the shapes differ; nothing where None is recorded."""
        if recorded is None:
            return
        ours, recorded = np.asarray(ours), np.asarray(recorded)
        differ = int((ours != recorded).sum()) if ours.shape == recorded.shape else max(ours.size, recorded.size, 1)
        self.errors.append((name, float(differ)))

    def same(self, name: str, ours: Any, recorded: Any) -> None:
        """Add a table row: one difference unless both values are equal."""
        self.errors.append((name, float(ours != recorded)))

    def check(self) -> list[Check]:
        """[Check], or [] when nothing was compared."""
        if not self.errors:
            return []
        beyond = [name for name, e in self.errors if not e <= self.tolerance]
        worst = beyond[0] if beyond else max(self.errors, key=lambda e: e[1])[0]
        error = max(e for _, e in self.errors) if self.tolerance else sum(e for _, e in self.errors)
        return [Check(self.case, self.group, error, self.tolerance, len(self.errors), worst)]


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
