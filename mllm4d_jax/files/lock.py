"""A folder has one writer at a time; a small JSON file says who that is and when it was last there.

Two signs tell that a writer is alive. The kernel's lock on the file, which every process of the machine sees (on some
network disks those of other machines, too) and which is dropped however the process ends. And the time in the file,
renewed every few seconds, for other machines and for disks without such locks. So a killed writer leaves nothing to be
cleared away: on its own machine the next one begins at once, elsewhere once the time has stood still for long enough.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from mllm4d_jax.files.storage import storing

NAME = "lock.json"
BEAT_S = 15.0  # between two renewals of the time
STALE_S = 120.0  # a time that stands still for so long is of a writer that is gone
_SIZE = 512  # bytes of the file: renewing it needs no room on a full disk
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine, whatever they are called
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


class LockError(ValueError):
    """Another run is writing to the folder, or has taken it over."""


class WriterLock:
    """Makes this process the only writer of something. Use as a context manager.

    Entering it waits where the last writer was on another machine, until it gives a sign or is taken for dead.
    """

    def __init__(self, path: str | Path, what: object, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        """
        Args:
          path: the file, in a folder that exists.
          what: is written, for messages.
          beat_s, stale_s: as the constants say.
        """
        self._path, self._what, self._beat_s, self._stale_s = Path(path), what, beat_s, stale_s
        boot = _BOOT.read_text().strip() if _BOOT.is_file() else socket.gethostname()
        self._owner = {"host": socket.gethostname(), "machine": boot, "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._file = -1
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    @classmethod
    def of(cls, folder: str | Path) -> Self:
        """Return the lock of a folder, which exists."""
        return cls(Path(folder) / NAME, folder)

    def __enter__(self) -> Self:
        """
        Raises:
          LockError: another run is writing.
          StorageError: the file cannot be written.
        """
        with storing(self._path):
            self._file = self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._holds():
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._file)

    def check(self) -> None:
        """Raises LockError if another run has taken over, thinking this one dead."""
        if not self._holds():
            raise LockError(
                f"{self._what} was taken over by {said(_read(self._path))} while this run gave no sign: it ends here "
                "and writes nothing more"
            )

    def _take(self) -> int:
        """Return the open file once no other writer is alive, with this one in it."""
        watched, since = None, time.monotonic()
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                locked, owner = _lock(file), _read(self._path)
                if locked is False or (watched and owner and owner != watched):
                    raise LockError(
                        f"another run is writing to {self._what}: {said(owner)}. Wait for it, end it, or use another "
                        "folder"
                    )
                # Its name may be gone by now, with the writer before; then the next round makes it anew.
                if _same(file, self._path) and self._is_free(owner, locked, time.monotonic() - since):
                    self._write(file)
                    taken, file = file, -1
                    return taken
            finally:
                if file >= 0:
                    os.close(file)
            if watched is None and owner:
                watched = owner
                print(f"{self._path}: waiting for a sign of {said(owner)}", file=sys.stderr, flush=True)
            time.sleep(min(1.0, self._beat_s / 4))

    def _is_free(self, owner: dict[str, Any] | None, locked: bool | None, unchanged_s: float) -> bool:
        if not owner or (locked and owner["machine"] == self._owner["machine"]):
            return True
        # Clocks of machines differ: an old time alone proves nothing.
        old = time.time() - owner["time"] > self._stale_s
        return unchanged_s > (1.5 * self._beat_s if old else self._stale_s)

    def _holds(self) -> bool:
        return (_read(self._path) or {}).get("id") == self._owner["id"]

    def _write(self, file: int) -> None:
        os.pwrite(file, json.dumps(self._owner | {"time": time.time()}).encode().ljust(_SIZE), 0)

    def _beat(self) -> None:
        while not self._over.wait(self._beat_s):
            if self._holds():
                with contextlib.suppress(OSError):  # a disk that is full or away for now
                    self._write(self._file)


def _lock(file: int) -> bool | None:
    """Lock an open file; False when another process has it, None where the disk knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Return who a file names as the writer; None without a file, and as `owner_of`."""
    try:
        return owner_of(path.read_bytes())
    except OSError:
        return None


def owner_of(text: bytes) -> dict[str, Any] | None:
    """Return who a text names as the writer; None for an empty one, nobody known for one that is damaged."""
    try:
        owner = json.loads(text)
    except ValueError:
        owner = None
    wanted = {"host": str, "machine": str, "pid": int, "id": str, "time": float}
    if isinstance(owner, dict) and all(isinstance(owner.get(key), kind) for key, kind in wanted.items()):
        return owner
    return {"host": "?", "machine": "", "pid": 0, "id": "", "time": 0.0} if text.strip() else None


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def said(owner: dict[str, Any] | None) -> str:
    if not owner or not owner["pid"]:
        return "another process"
    return f"process {owner['pid']} on {owner['host']}, last there {max(0.0, time.time() - owner['time']):.0f} s ago"
