"""The records that could not be used: written down once each, skipped from then on, counted against a ceiling."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mllm4d_jax.processing.errors import RecordError

MIN_SEEN = 20  # no verdict on a share before this many records


class QuarantineError(ValueError):
    """Too many records are unusable to go on."""


class Quarantine:
    """`quarantine.jsonl` of a run: one line {"index", "key", "reason", "message"} per record.

    A record named there is skipped without being tried again, so that a resumed run sees the same examples as the
    first one; delete the file to try all records again.

    Attributes:
      rejected: how often a record was skipped so far, repeats in later epochs included.
    """

    def __init__(self, path: str | Path, max_rate: float, *, rejected: int = 0, fresh: bool = False) -> None:
        """Reads what an earlier part of the run wrote.

        Args:
          path: the file; created with the first bad record.
          max_rate: largest share of unusable records the run puts up with.
          rejected: the count at the position the run resumes from.
          fresh: True forgets an existing file (a run from the start).
        """
        self.path, self.max_rate, self.rejected = Path(path), max_rate, rejected
        if fresh:
            self.path.unlink(missing_ok=True)
        self._known = self._read()

    def __contains__(self, index: int) -> bool:
        return index in self._known

    def _read(self) -> set[int]:
        if not self.path.exists():
            return set()
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the process died while writing it
            lines.pop()
            self.path.write_bytes(b"".join(lines))
        return {json.loads(line)["index"] for line in lines}

    def add(self, index: int, error: RecordError) -> None:
        """Writes record `index` down, unless it is there already."""
        if index in self._known:
            return
        self._known.add(index)
        entry = {"index": index, "key": error.key, "reason": error.reason, "message": error.message}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def count(self, seen: int) -> None:
        """Counts one skipped record, the `seen`-th of the run.

        The ceiling is `rate * seen` plus three standard deviations of a Poisson count with that mean, from MIN_SEEN
        records on: data whose true share is within the limit is not stopped for a few bad records in a row.

        Raises:
          QuarantineError: the count is above the ceiling.
        """
        self.rejected += 1
        mean = self.max_rate * seen
        if seen >= MIN_SEEN and self.rejected > mean + 3 * math.sqrt(mean):
            raise QuarantineError(
                f"{self.rejected} of the first {seen} records are unusable, more than data.max_quarantine_rate = "
                f"{self.max_rate:g} allows; every one is named with its reason in {self.path}. Check data.root and the "
                "reasons first; raise the rate only if these records may be left out"
            )
