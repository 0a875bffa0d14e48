"""Copies, on this machine, of files in a bucket, under `$XDG_CACHE_HOME/mllm4d_jax` (by default `~/.cache`).

Clips: a bounded number of bytes, shared by all processes of the machine; each is fetched once, by the first who needs
it, and is taken to stay as it is, so that one that is here costs no request. Lists and sets of records: one copy of
each version, by the bucket's own number of it, which stays until somebody deletes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mllm4d_jax.files import remote
from mllm4d_jax.files.atomic import PARTIAL
from mllm4d_jax.files.storage import storing

_LOCK = ".lock"
_ROOM = 0.9  # share of the bound that is left in use once clips have been thrown out
_LOOK = 50  # one in so many of the bound's bytes is fetched before the folder is looked through again
_LONGEST_NAME = 120  # bytes; file systems have a limit of 255
DEFAULT_GIB = 100.0  # of clips


def cache_folder() -> Path:
    """Return the folder that all copies are in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm4d_jax"


class ClipCache:
    """Clips of buckets as files of this machine. Pickles."""

    def __init__(self, max_bytes: float = DEFAULT_GIB * 2**30) -> None:
        """`max_bytes`: of all clips together; each process may be over it by a fiftieth, and by the clips in use."""
        self.max_bytes, self._unseen = max_bytes, float("inf")

    @contextlib.contextmanager
    def held(self, path: str) -> Iterator[Path]:
        """Yield the copy of a clip, which stays there as long as the block runs; it is fetched if it is not there.

        Raises:
          FileNotFoundError, TransferError: what is wrong with it; RemoteError: with its bucket.
          StorageError: the disk is full or the like.
        """
        entry, lock = _places(path)
        with storing(entry):
            entry.parent.parent.mkdir(parents=True, exist_ok=True)
            while True:
                with _locked(lock, fcntl.LOCK_SH):
                    if entry.exists():
                        os.utime(entry)
                        yield entry
                        return
                with _locked(lock, fcntl.LOCK_EX):
                    if not entry.exists():
                        self._fetch(path, entry)

    def _fetch(self, path: str, entry: Path) -> None:
        entry.parent.mkdir(exist_ok=True)
        partial = entry.with_name(PARTIAL)
        try:
            remote.fetch(path, partial)
            self._unseen += partial.stat().st_size
            os.replace(partial, entry)
        except BaseException:
            shutil.rmtree(entry.parent, ignore_errors=True)
            raise
        if self._unseen > self.max_bytes / _LOOK:
            self._unseen = 0
            self._make_room(entry.parents[2])

    def _make_room(self, folder: Path) -> None:
        """Throw out what was not used for longest and is not in use, once there is too much."""
        files = []
        for file in folder.glob("*/*/*"):
            with contextlib.suppress(FileNotFoundError):
                about = file.stat()
                files.append((about.st_mtime_ns, about.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files) if total > self.max_bytes else ():
            if total <= _ROOM * self.max_bytes:
                return
            lock = file.parent.with_name(file.parent.name + _LOCK)
            with contextlib.suppress(BlockingIOError), _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(file.parent, ignore_errors=True)
                lock.unlink()
                total -= size


@contextlib.contextmanager
def held_if_there(path: str) -> Iterator[Path | None]:
    """Yield the copy of a clip as `ClipCache.held` does, None where there is none; the bucket is not asked."""
    entry, lock = _places(path)
    if not entry.exists():
        yield None
        return
    with _locked(lock, fcntl.LOCK_SH):
        yield entry if entry.exists() else None


def _places(path: str) -> tuple[Path, Path]:
    """Return where the copy of a clip is, and the file that is locked for it."""
    key = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:40]
    entry = cache_folder() / "clips" / key[:2] / key / _short(path.rpartition("/")[2])
    return entry, entry.parent.with_name(key + _LOCK)


def _short(name: str) -> str:
    """Return the end of a name, with its suffix, that any file system takes; of most names all."""
    return name.encode("utf-8", "surrogatepass")[-_LONGEST_NAME:].decode("utf-8", "ignore")


def copied_file(path: str | os.PathLike) -> Path:
    """Return a file of this machine with what is at a path: itself, or the copy of an object, made if need be.

    Raises:
      FileNotFoundError; RemoteError, TransferError; StorageError.
    """
    if not remote.is_remote(path):
        return Path(path)
    version = str(remote.info(path)["generation"])
    return _made_once(str(path), version, lambda entry: remote.fetch(path, entry))


def copied_folder(path: str | os.PathLike) -> Path:
    """Return a folder of this machine with all that is below a path: itself, or a copy. Raises as `copied_file`."""
    if not remote.is_remote(path):
        return Path(path)
    there = remote.found(path)
    version = repr(sorted((name, str(about["generation"])) for name, about in there.items()))

    def make(entry: Path) -> None:
        for name in there:
            file = entry / name
            file.parent.mkdir(parents=True, exist_ok=True)
            remote.fetch(remote.join(path, name), file)

    return _made_once(str(path), version, make)


def _made_once(path: str, version: str, make: Callable[[Path], None]) -> Path:
    """Return the copy of a version of something, which has the last two parts of its name, each cut if it is long."""
    key = hashlib.sha256(f"{path}\n{version}".encode()).hexdigest()[:40]
    folder = cache_folder() / "whole" / key
    parent, name = map(_short, path.rstrip("/").split("/")[-2:])
    with storing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(key + _LOCK), fcntl.LOCK_EX):
            if not folder.exists():
                partial = folder.with_name(key + PARTIAL)
                shutil.rmtree(partial, ignore_errors=True)
                (partial / parent).mkdir(parents=True)
                make(partial / parent / name)
                partial.rename(folder)
    return folder / parent / name


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Hold a lock on a file, made if need be. Raises BlockingIOError for one that is taken, where `how` says so."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, how)
            # Who threw the file out while this one waited for its lock has taken its name away.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                yield
                return
        finally:
            os.close(file)
