"""The log of a run's steps: metrics.jsonl, TensorBoard and the progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from mllm4d_jax.files import jsonl
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.parallel import multihost
from mllm4d_jax.report.columns import line, summary
from mllm4d_jax.report.reading import FACTS, METRICS


class RunLog:
    """Record every step. Use as a context manager.

    One line per step goes to metrics.jsonl; the progress bar, with the time left, and TensorBoard get the summary of
    the steps (`report.columns.summary`) every `log_every` steps. In a run over several processes only the first one
    records.
    """

    def __init__(
        self, workdir: str | Path, name: str, columns: Sequence[str], steps: int, start: int, log_every: int
    ) -> None:
        """Takes the files up after step `start`; what an interrupted run wrote beyond it is removed.

        Args:
          workdir: gets metrics.jsonl and tb/.
          name: of the progress bar; `columns`: beside it.
          steps: of the whole run.
          start: steps already done.
          log_every: steps between updates of bar and TensorBoard.

        Raises:
          JsonLinesError: metrics.jsonl is damaged; StorageError: it cannot be written.
        """
        self.path, self._columns, self._every, self._window = Path(workdir) / METRICS, columns, log_every, []
        self._board = self._bar = None
        if multihost.is_primary():
            # Imported here: it takes a moment, and only a run that trains needs it.
            from mllm4d_jax.run.board import Board

            jsonl.rewind(self.path, start)
            self._board = Board(Path(workdir) / "tb", purge_step=start + 1)
            self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._board.close()

    def step(self, row: Mapping[str, float | None] | None) -> None:
        """Record one step; None is no step.

        Args:
          row: "step" (from 1) and any columns; None for what is not known.
        """
        if row is None or self._bar is None:
            return
        jsonl.append(self.path, [row])
        self._window.append(row)
        self._bar.update(1)
        if row["step"] % self._every == 0 or row["step"] == self._bar.total:
            values = summary(self._window)
            self._board.add({f"train/{name}": value for name, value in values.items()}, int(row["step"]))
            self._bar.set_postfix_str(line(values, self._columns))
            self._window = []


def say(text: str) -> None:
    """Print, once per run; '' is nothing."""
    if text and multihost.is_primary():
        print(text, flush=True)


def write_facts(folder: Path, facts: Mapping[str, object]) -> None:
    """Print what a run is, and write it down for its page, once per run."""
    if multihost.is_primary():
        write_json(folder / FACTS, facts)
    say("\n".join(f"{name}: {value}" for name, value in facts.items()))
