"""The folder that a run writes to, for itself alone: on a disk, or in a bucket."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections

from mllm4d_jax import __version__
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.files.bucket_lock import BucketLock, take_folder
from mllm4d_jax.files.lock import WriterLock
from mllm4d_jax.files.mirror import Mirror, copy_of
from mllm4d_jax.files.remote import is_remote, place
from mllm4d_jax.parallel import multihost
from mllm4d_jax.report.reading import CONFIG
from mllm4d_jax.run.preflight import PreflightError


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A folder that this run holds.

    Attributes:
      path: of the folder; of one in a bucket the copy on this machine, which is uploaded.
      home: of the folder itself, for what Orbax writes.
      lock: that holds it; None on all processes of the run but the first.
      mirror: of the copy; None on a disk.
    """

    path: Path
    home: Path
    lock: WriterLock | BucketLock | None
    mirror: Mirror | None = None

    def check(self) -> None:
        """Make sure of the folder before a checkpoint is written or appears: logs in the bucket are never behind it.

        Raises:
          LockError: another run has taken the folder over, thinking this one dead.
          RemoteError: the logs cannot be uploaded.
        """
        if self.lock is not None:
            self.lock.check()
        if self.mirror is not None:
            self.mirror.push()

    def share(self) -> None:
        """Let the first process see the files that all have written; every process of the run has to call this."""
        if self.mirror is not None:
            self.mirror.push()
            multihost.gather([0])
            if multihost.is_primary():
                self.mirror.pull()


def write_config(folder: Path, config: ml_collections.ConfigDict) -> None:
    """Write config.json: the resolved config of a run, and the version that it is run with."""
    write_json(folder / CONFIG, config.to_dict() | {"version": __version__})


@contextlib.contextmanager
def hold_workdir(workdir: str | Path) -> Iterator[Workdir]:
    """Make the folder of a run and keep other runs out of it; every process of the run has to call this.

    Raises:
      PreflightError: it cannot be made.
      LockError: another run is writing there; FirstProcessError on the other processes of this one.
      StorageError, RemoteError: it cannot be written.
    """
    with contextlib.ExitStack() as held:
        if is_remote(workdir):
            yield _hold_remote(str(workdir), held)
            return
        path = Path(workdir)

        def take() -> WriterLock:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise PreflightError(f"workdir '{path}' cannot be written: {problem.strerror}") from problem
            return held.enter_context(WriterLock.of(path))

        yield Workdir(path, path, multihost.primary_only(take))


def not_held(workdir: str | Path) -> Workdir:
    """Return a folder of a disk whose files have locks of their own, or which nothing is written to."""
    return Workdir(Path(workdir), Path(workdir), None)


def _hold_remote(workdir: str, held: contextlib.ExitStack) -> Workdir:
    folder = copy_of(workdir, str(jax.process_index()))

    lock = multihost.primary_only(lambda: take_folder(workdir, folder.parent, held))
    mirror = Mirror(workdir, folder) if lock is None else Mirror(workdir, folder, lock.check)
    return Workdir(folder, place(workdir), lock, held.enter_context(mirror))
