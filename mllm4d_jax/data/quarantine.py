"""The records that could not be used: written down once each, skipped from then on, counted against a ceiling."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mllm4d_jax.qa.errors import RecordError

MIN_GROUPS = 20  # no verdict on a share before this many groups of questions


class QuarantineError(ValueError):
    """Too many records are unusable to go on."""


class Quarantine:
    """`quarantine.jsonl` of a run: one line {"source", "index", "key", "reason", "message"} per record.

    A record named there is skipped without being tried again, so that a resumed run sees the same examples as the
    first one; delete the file to try all records again. With several hosts each writes a file of its own
    (`quarantine-1.jsonl`, ...) and skips what any of them knows.

    Attributes:
      path: this host's file.
      rejected: how often a record was skipped so far, repeats in later epochs included.
    """

    def __init__(
        self,
        path: str | Path,
        max_rate: float,
        *,
        rejected: int = 0,
        fresh: bool = False,
        host: int = 0,
        per_group: int = 1,
    ) -> None:
        """Reads what an earlier part of the run wrote.

        Args:
          path: the first host's file; created with the first bad record.
          max_rate: largest share of unusable records the run puts up with.
          rejected: the count at the position the run resumes from.
          fresh: True forgets this host's file (a run from the start).
          host: number of this host.
          per_group: questions that a bad clip takes out together.
        """
        first = Path(path)
        self.path = first.with_name(f"{first.stem}-{host}{first.suffix}") if host else first
        self.max_rate, self.rejected, self._per_group = max_rate, rejected, per_group
        if fresh:
            self.path.unlink(missing_ok=True)
        self._known: set[tuple[int, int]] = set()
        if not fresh:
            others = first.parent.glob(f"{first.stem}-*{first.suffix}") if first.parent.is_dir() else ()
            for file in {self.path, first, *others}:
                self._known |= _read(file, repair=file == self.path)

    def knows(self, source: int, index: int) -> bool:
        """Whether record `index` of source `source` is unusable."""
        return (source, index) in self._known

    def add(self, source: int, index: int, error: RecordError) -> None:
        """Writes record `index` of source `source` down, unless it is there already."""
        if (source, index) in self._known:
            return
        self._known.add((source, index))
        entry = {"source": source, "index": index, "key": error.key, "reason": error.reason, "message": error.message}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def count(self, seen: float) -> None:
        """Counts one skipped record among the first `seen` of the run (on this host).

        The ceiling is `rate * seen` plus three standard deviations of a count with that mean whose records go bad
        `per_group` at a time, as those of a damaged clip do, from MIN_GROUPS full groups on: data whose true share is
        within the limit is not stopped for a few bad clips in a row.

        Raises:
          QuarantineError: the count is above the ceiling.
        """
        self.rejected += 1
        mean = self.max_rate * seen
        if seen >= MIN_GROUPS * self._per_group and self.rejected > mean + 3 * math.sqrt(mean * self._per_group):
            raise QuarantineError(
                f"{self.rejected} of the first {seen:.0f} records are unusable, more than data.max_quarantine_rate = "
                f"{self.max_rate:g} allows; every one is named with its reason in {self.path}. Check data.root and the "
                "reasons first; raise the rate only if these records may be left out"
            )


def _read(path: Path, repair: bool) -> set[tuple[int, int]]:
    """The records a file names; `repair` cuts off a line that its process died while writing."""
    if not path.exists():
        return set()
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        if repair:
            path.write_bytes(b"".join(lines))
    entries = [json.loads(line) for line in lines]
    return {(entry.get("source", 0), entry["index"]) for entry in entries}
