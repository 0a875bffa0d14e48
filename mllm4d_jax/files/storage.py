"""Errors of the place where files are, said in words: which file, what the system says, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

_FREE = "free some space there"
_RIGHTS = "give write permission, or name another folder"
_MACHINE = "look at this disk or its mount"
_THERE = "something is there already: remove it or name another place"
_FILES = "raise the limit on open files (ulimit -n)"
REMEDIES: Mapping[int, str] = MappingProxyType(
    {
        errno.ENOSPC: _FREE,
        errno.EDQUOT: _FREE,
        errno.EFBIG: "the file system or a limit (ulimit -f) allows no larger file",
        errno.EROFS: _RIGHTS,
        errno.EACCES: _RIGHTS,
        errno.EPERM: _RIGHTS,
        errno.ENOTDIR: "a file is where a folder should be",
        errno.EISDIR: "a folder is where a file should be",
        errno.EEXIST: _THERE,
        errno.ENOTEMPTY: _THERE,
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ELOOP: "links lead in a circle there",
        errno.EIO: _MACHINE,
        errno.ESTALE: _MACHINE,
        errno.EMFILE: _FILES,
        errno.ENFILE: _FILES,
    }
)


class StorageError(OSError, ValueError):
    """A file cannot be written or read with the disk, the rights and the limits as they are."""

    @classmethod
    def of(cls, problem: OSError, path: str | Path) -> StorageError:
        """Return the error for what the system said; `path` is named where it named no file itself."""
        return cls(problem.errno, problem.strerror, str(problem.filename or path))

    def __str__(self) -> str:
        remedy = REMEDIES.get(self.errno)
        return f"{self.filename}: {self.strerror}" + (f" ({remedy})" if remedy else "")


@contextlib.contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Name the file that the block writes in errors of the disk, which say no name when a write fails.

    Raises:
      StorageError: for those that `REMEDIES` knows; other errors pass.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as problem:
        disk = of_disk(problem, path)
        if disk is None:
            raise
        raise disk from problem


def of_disk(problem: BaseException | None, path: str | Path) -> StorageError | None:
    """Return what an error says of the disk, also where a library has wrapped it in one of its own; None for nothing.

    TensorStore and what is written in Rust put the number of the system's error into their text.
    """
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in REMEDIES:
            return StorageError.of(problem, path)
        number = re.search(r"\[os_error_code='(\d+)'|\(os error (\d+)\)", str(problem))
        if number and (code := int(number[1] or number[2])) in REMEDIES:
            return StorageError(code, os.strerror(code), str(path))
        problem = problem.__cause__
    return None
