"""Files and folders that are either there whole or not there: written beside their name, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mllm4d_jax.files.lock import WriterLock
from mllm4d_jax.files.remote import is_file, is_remote, join, remove, remove_folder, upload
from mllm4d_jax.files.storage import StorageError, storing

PARTIAL = ".partial"  # part of the name of everything that is still being written


@contextlib.contextmanager
def replacing(path: str | Path, ending: str = "") -> Iterator[Path]:
    """Yield a free name beside `path`; the file written there becomes `path` when the block ends without an error.

    Args:
      path: the final name; a file that is there is replaced.
      ending: of the free name, for writers that choose a format by it, e.g. ".mp4".

    Raises:
      StorageError: the disk is full, read-only or the like; RemoteError.
    """
    if is_remote(path):  # objects appear whole, once they are written
        with tempfile.TemporaryDirectory() as folder:
            yield (partial := Path(folder) / f"object{ending}")
            upload(path, partial)
        return
    path = Path(path)
    # Process and thread make the name unique among the writers of this machine that race for one file.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}{ending}")
    try:
        with storing(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # a read-only disk; it would hide the reason
            partial.unlink()


def require_place(path: str | Path) -> None:
    """Make the folder of a file that is to be written later, and see that it can be: before the work, not after it.

    Raises:
      StorageError: it cannot, as the disk and the rights are now.
    """
    if is_remote(path):  # `remote.require` has asked its bucket
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as problem:
        raise StorageError(problem.errno, problem.strerror, str(path)) from problem


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file to write to, which appears as `path` when the block ends without an error."""
    with replacing(path) as partial, partial.open("wb") as file:
        yield file


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a small file whole; readers see the old content or the new one, never a mixture."""
    with open_atomic(path) as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as a JSON file, keys sorted, whole or not at all."""
    write_atomic(path, f"{json.dumps(value, indent=1, sort_keys=True)}\n".encode())


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is renamed to `path` when the block ends without an error.

    `path` must not exist then, or be empty. What an earlier writer left when it was killed is removed first. In a
    bucket the files are uploaded at the end, below a mark that says until then that they are not all there.

    Raises:
      LockError: another writer is at work on the same folder.
      StorageError: the disk is full, read-only or the like; RemoteError.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            if unfinished(path):
                remove_folder(path)
            (partial := Path(folder) / "folder").mkdir()
            yield partial
            _upload_folder(partial, str(path))
        return
    path = Path(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with WriterLock(path.with_name(f".{path.name}.lock"), path):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                yield partial
                partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def unfinished(path: str | Path) -> bool:
    """Whether a folder in a bucket is one that `new_folder` had not uploaded whole when it was killed."""
    return is_remote(path) and is_file(join(path, PARTIAL))


def _upload_folder(folder: Path, path: str) -> None:
    """Upload a folder; where that fails, nothing of it stays. What says what the others are comes last: *.json."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.suffix == ".json", p))
    try:
        upload(mark := join(path, PARTIAL), b"")
        for file in files:
            upload(join(path, file.relative_to(folder).as_posix()), file)
        remove(mark)
    except BaseException:
        with contextlib.suppress(Exception):
            remove_folder(path)
        raise


def remove_partials(folder: Path, pattern: str = "*") -> None:
    """Delete what killed writers of files left. Only for a caller who knows that nobody is writing there."""
    for path in folder.glob(f"{pattern}{PARTIAL}*"):
        path.unlink(missing_ok=True)
