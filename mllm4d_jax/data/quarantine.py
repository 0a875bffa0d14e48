"""The records that could not be used: written down once each, skipped from then on, counted against a ceiling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mllm4d_jax.files import jsonl
from mllm4d_jax.files.quoting import cut, shown
from mllm4d_jax.qa.errors import RecordError

_SHOWN_REASONS = 8
MIN_GROUPS = 20  # no verdict on a share before this many groups of questions


class QuarantineError(ValueError):
    """Too many records are unusable to go on, or the list of them cannot be read."""


class Quarantine:
    """`quarantine.jsonl` of a run: one line {"source", "index", "key", "reason", "message"} per record.

    A record named there is skipped without being tried again, so that a resumed run sees the same examples as the
    first one; delete the file to try all records again. With several hosts each writes a file of its own
    (`quarantine.1.jsonl`, ...) and skips what any of them knows. Where nothing else ties the file to what its records
    were tried with, each line has a hash of that, too, in "config".

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
        config: str = "",
    ) -> None:
        """Reads what an earlier part of the run wrote.

        Args:
          path: the first host's file; created with the first bad record.
          max_rate: largest share of unusable records the run puts up with.
          rejected: the count at the position the run resumes from.
          fresh: True deletes the files of all hosts (a run from the start; all come here before one reads a record).
          host: number of this host.
          per_group: questions that a bad clip takes out together.
          config: hash of what decides which records are unusable; '' where the caller makes sure of that.

        Raises:
          JsonLinesError: a line is damaged; QuarantineError: it names no record, or was made with another `config`.
        """
        self.path, self._of_all = jsonl.of_host(path, host), path
        self.max_rate, self.rejected, self._per_group, self._config = max_rate, rejected, per_group, config
        for file in jsonl.of_all_hosts(path) if fresh else ():
            file.unlink(missing_ok=True)
        jsonl.rewind(self.path)
        self._known = {_record(file, line, config) for file in jsonl.of_all_hosts(path) for line in jsonl.read(file)}

    def knows(self, source: int, index: int) -> bool:
        """Whether record `index` of source `source` is unusable."""
        return (source, index) in self._known

    def add(self, source: int, index: int, error: RecordError) -> None:
        """Writes record `index` of source `source` down, unless it is there already."""
        if (source, index) in self._known:
            return
        self._known.add((source, index))
        entry = {"source": source, "index": index, "key": error.key, "reason": error.reason, "message": error.message}
        jsonl.append(self.path, [entry | ({"config": self._config} if self._config else {})])

    def nothing_usable(self, name: str) -> QuarantineError:
        """Return the error for a run of which not one record was usable; `name`: of the records."""
        return QuarantineError(
            f"not one usable record in {name}: {main_reasons(self._of_all)}. Every one is named with its reason in "
            f"{self.path}; check data.root and the reasons"
        )

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


def main_reasons(path: str | Path) -> str:
    """Return why records are unusable, the most frequent reason first: "7 missing_file, 2 bad_json".

    All that the files of all hosts name is counted.

    Args:
      path: the first host's file.
    """
    lines = (line for file in jsonl.of_all_hosts(path) for line in jsonl.scan(file) if line.row is not None)
    return counted(str(line.row.get("reason")) for line in lines)


def counted(reasons: Iterable[str]) -> str:
    """Return how often each reason occurs, the most frequent first: "7 missing_file, 2 bad_json"."""
    found = Counter(reasons).most_common(_SHOWN_REASONS)
    return ", ".join(f"{n} {cut(reason, 40)}" for reason, n in found) or "none was tried"


def _record(path: Path, line: jsonl.Line, config: str) -> tuple[int, int]:
    """Return the source and the index that a line names; `config`: that it has to be of."""
    if config and (made := line.row.get("config")) != config:
        raise QuarantineError(
            f"{path}, line {line.number}: made with another configuration ({shown(made)}, this run is {config}): use "
            "another workdir, or delete this file to try all records again"
        )
    found = line.row.get("source", 0), line.row.get("index")
    if not all(isinstance(number, int) for number in found):
        raise QuarantineError(
            f"{path}, line {line.number}: 'source' and 'index' name no record. Delete this line, or the whole file to "
            "try all records again"
        )
    return found
