"""The folder of a run in a bucket, and its copy on this machine, where its files are read and written.

Objects cannot grow. So logs grow on the disk, and are uploaded whole: at a period, when a checkpoint is about to
appear, and at the end. A log in the bucket is thus never behind a checkpoint there; where it is ahead of it, a run that
goes on cuts it, as one on a disk does. A run begins with what the bucket has, and nothing else that is on the disk.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from mllm4d_jax.files import remote
from mllm4d_jax.files.atomic import PARTIAL
from mllm4d_jax.files.cache import cache_folder
from mllm4d_jax.files.lock import NAME, LockError

PERIOD_S = 60.0
OWN_WAY = ("checkpoints", "start", NAME)  # what Orbax writes into a run's folder, and the lock
_THREADS = 8

log = logging.getLogger(__name__)


class Mirror:
    """A copy of a folder in a bucket, uploaded while the block runs and at its end. Use as a context manager.

    Attributes:
      folder: the copy.
    """

    def __init__(
        self, path: str, folder: Path, guard: Callable[[], None] = lambda: None, period_s: float = PERIOD_S
    ) -> None:
        """
        Args:
          path: of the folder in the bucket; `OWN_WAY` in it is left alone.
          folder: the copy; emptied first.
          guard: called before anything is uploaded; raises LockError where that must not be.
          period_s: between two uploads.
        """
        self.path, self.folder, self._guard, self._period_s = path, folder, guard, period_s
        self._known: dict[str, tuple[int, int]] = {}  # name -> size and time of what the bucket has
        self._fetched: dict[str, str] = {}  # name -> its version there, of what others wrote
        self._pushing, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._push_often, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        """Raises RemoteError, TransferError."""
        self.begin()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Upload what is not in the bucket yet. Raises RemoteError and what `guard` raises, if all else went well."""
        self._over.set()
        self._thread.join()
        try:
            self.push()
        except (remote.RemoteError, LockError) as problem:
            if kind is None:
                raise
            log.error("not uploaded: %s", problem)

    def begin(self) -> None:
        """Make the copy what the bucket has. Raises RemoteError, TransferError."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.pull()

    def pull(self) -> None:
        """Fetch what others have written since it was last looked at. Raises RemoteError, TransferError."""
        there = {name: str(about["generation"]) for name, about in remote.found(self.path).items()}
        wanted = [name for name in there if not _left_out(name) and self._is_older(name, there[name])]

        def fetch(name: str) -> None:
            file = self.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            remote.fetch(remote.join(self.path, name), file)
            self._known[name], self._fetched[name] = _state(file), there[name]

        with self._pushing, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch, wanted))

    def _is_older(self, name: str, version: str) -> bool:
        file = self.folder / name
        if not file.exists():
            return name not in self._known
        return self._fetched.get(name, version) != version and self._known.get(name) == _state(file)

    def push(self) -> None:
        """Upload what has changed, and delete there what was deleted here. Raises RemoteError."""
        with self._pushing:
            here = {}
            for file in self.folder.rglob("*"):
                name = file.relative_to(self.folder).as_posix()
                if not _left_out(name) and file.is_file():
                    here[name] = file
            gone = sorted(self._known.keys() - here.keys())
            if gone or any(self._known.get(name) != _state_of(file) for name, file in here.items()):
                self._guard()
            for name in gone:
                remote.remove(remote.join(self.path, name), self._fetched.pop(name, None))
                del self._known[name]
            for name, file in sorted(here.items()):
                state = _state_of(file)
                if state is None or self._known.get(name) == state:
                    continue
                try:
                    with file.open("rb") as opened:
                        data = opened.read(state[0])  # a log may grow meanwhile
                except FileNotFoundError:
                    continue  # deleted just now
                remote.upload(remote.join(self.path, name), data)
                self._known[name] = state
                self._fetched.pop(name, None)

    def _push_often(self) -> None:
        while not self._over.wait(self._period_s):
            try:
                self.push()
            except Exception as problem:  # the next one, or the end of the run, says so
                log.warning("not uploaded for now: %s", problem)


def copy_of(path: str, part: str = "0") -> Path:
    """Return where the copy of a folder is; `part`: for several on one machine."""
    return cache_folder() / "workdirs" / hashlib.sha256(path.rstrip("/").encode()).hexdigest()[:40] / part


def copied_logs(path: str | Path) -> Path:
    """Return the folder of a run, of one in a bucket a copy without its checkpoints. Raises RemoteError."""
    if not remote.is_remote(path):
        return Path(path)
    folder = copy_of(str(path), "read")
    Mirror(str(path), folder).begin()
    return folder


def _left_out(name: str) -> bool:
    return PARTIAL in name or name.partition("/")[0] in OWN_WAY


def _state_of(file: Path) -> tuple[int, int] | None:
    """Return `_state`, None for a file that was deleted meanwhile."""
    try:
        return _state(file)
    except FileNotFoundError:
        return None


def _state(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns
