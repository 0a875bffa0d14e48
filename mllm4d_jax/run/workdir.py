"""The folder that a run writes to, for itself alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mllm4d_jax.files.lock import WriterLock
from mllm4d_jax.parallel import multihost
from mllm4d_jax.run.preflight import PreflightError


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A folder that this run holds.

    Attributes:
      path: of the folder.
      lock: that holds it; None on all processes of the run but the first.
    """

    path: Path
    lock: WriterLock | None

    def check(self) -> None:
        """Raises LockError if another run has taken the folder over, thinking this one dead."""
        if self.lock is not None:
            self.lock.check()


@contextlib.contextmanager
def hold_workdir(workdir: str | Path) -> Iterator[Workdir]:
    """Make the folder of a run and keep other runs out of it; every process of the run has to call this.

    Raises:
      PreflightError: it cannot be made.
      LockError: another run is writing there; FirstProcessError on the other processes of this one.
      StorageError: it cannot be written.
    """
    path = Path(workdir)

    def take() -> WriterLock:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise PreflightError(f"workdir '{path}' cannot be written: {problem.strerror}") from problem
        return held.enter_context(WriterLock.of(path))

    with contextlib.ExitStack() as held:
        yield Workdir(path, multihost.primary_only(take))
