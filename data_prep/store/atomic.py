"""Files that are either there whole or not there: written beside their final name, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PARTIAL = ".partial"  # ends the name of every file that is still being written


class AtomicFile:
    """A binary file that appears under its name when the `with` block ends without an error, and not before.

    Attributes:
      path: the final name.
      size: bytes written so far.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.size = Path(path), 0
        # Process and thread make the name unique among the writers of this machine that race for one file.
        self._partial = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
        self._hash = hashlib.sha256()
        self._file: Any = None

    def __enter__(self) -> Self:
        self._file = open(self._partial, "wb")
        return self

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Hex digest of what has been written so far."""
        return self._hash.hexdigest()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes a small file whole; readers see the old content or the new one, never a mixture."""
    with AtomicFile(path) as file:
        file.write(data)


def remove_partials(folder: Path, pattern: str = "*") -> None:
    """Deletes what killed writers left behind. Only for a caller who knows that nobody is writing there."""
    for path in folder.glob(f"{pattern}{PARTIAL}"):
        path.unlink(missing_ok=True)
