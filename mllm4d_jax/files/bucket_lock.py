"""A folder in a bucket has one writer at a time, as `lock.WriterLock` has it for folders of a disk.

An object says who writes and when it was last there. Only one can make it, and only who knows its newest version can
replace it: the bucket itself compares. Nobody else can see whether a writer of another machine is alive: once its time
has stood still for long enough it is taken for dead. One of this machine is known to be, since it had the lock of its
copy of the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from mllm4d_jax.files import remote
from mllm4d_jax.files.lock import BEAT_S, NAME, STALE_S, LockError, WriterLock, owner_of, said
from mllm4d_jax.files.storage import storing


def take_folder(folder: str, copies: Path, held: contextlib.ExitStack) -> BucketLock:
    """Make this process the only writer of a folder in a bucket and of its copies on this machine, until `held` ends.

    Args:
      copies: a folder, made if need be.

    Raises:
      LockError: another run is writing; RemoteError; StorageError.
    """
    remote.require(folder)
    with storing(copies):
        copies.mkdir(parents=True, exist_ok=True)
    held.enter_context(WriterLock(copies / NAME, folder))
    mark = copies / "mark"  # tells this folder from those of all machines
    with storing(mark):
        if not mark.exists():
            mark.write_text(uuid.uuid4().hex)
        return held.enter_context(BucketLock(folder, mark.read_text()))


class BucketLock:
    """Makes this process the only writer of a folder in a bucket. Use as a context manager."""

    def __init__(self, folder: str, machine: str, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        """
        Args:
          machine: what only processes can name of which this one knows that they are gone.
          beat_s, stale_s: as in `lock`.
        """
        self._folder, self._path, self._beat_s, self._stale_s = folder, remote.join(folder, NAME), beat_s, stale_s
        self._owner = {"host": socket.gethostname(), "machine": machine, "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._generation = "0"
        # What is there is not read while this process replaces it: size and content would be of two versions.
        self._over, self._beating = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="bucket lock", daemon=True)

    def __enter__(self) -> Self:
        """
        Raises:
          LockError: another run is writing; RemoteError: the bucket cannot be used.
        """
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(remote.RemoteError):
            owner, generation = self._read()
            if owner and owner["id"] == self._owner["id"]:
                remote.remove(self._path, generation)  # unless somebody takes over at this moment

    def check(self) -> None:
        """Raises LockError if another run has taken over, thinking this one dead; RemoteError.

        An object that is gone, though nobody took over, is made again.
        """
        with self._beating:
            owner, _ = self._read()
            if owner is None:
                self._generation = "0"
                if self._write():
                    return
                owner, _ = self._read()
        if owner is None or owner["id"] != self._owner["id"]:
            raise LockError(
                f"{self._folder} was taken over by {said(owner)} while this run gave no sign: it ends here and writes "
                "nothing more"
            )

    def _take(self) -> None:
        watched, since = None, time.monotonic()
        while not self._write():
            owner, generation = self._read()
            if watched is not None and generation not in (watched, "0"):
                raise LockError(
                    f"another run is writing to {self._folder}: {said(owner)}. Wait for it, end it, or use another "
                    "folder"
                )
            if owner is None or owner["machine"] == self._owner["machine"] or self._is_stale(owner, since):
                self._generation = generation  # to be replaced, if it is still the same
                continue
            if watched is None:
                watched = generation
                print(f"{self._path}: waiting for a sign of {said(owner)}", file=sys.stderr, flush=True)
            self._generation = "0"
            time.sleep(min(1.0, self._beat_s / 4))

    def _is_stale(self, owner: dict[str, Any], since: float) -> bool:
        # Clocks of machines differ: an old time alone proves nothing.
        old = time.time() - owner["time"] > self._stale_s
        return time.monotonic() - since > (1.5 * self._beat_s if old else self._stale_s)

    def _write(self) -> bool:
        """Replace the version that is known; False if there is another one by now, of somebody else."""
        text = json.dumps(self._owner | {"time": time.time()}).encode()
        made = remote.write_if(self._path, text, self._generation)
        if made is None:
            owner, generation = self._read()  # a first answer may have been lost, and the request repeated
            if not owner or owner["id"] != self._owner["id"]:
                return False
            made = generation
        self._generation = made
        return True

    def _read(self) -> tuple[dict[str, Any] | None, str]:
        """Return (who the object names, None if it is not there; its version)."""
        try:
            about = remote.info(self._path)
            text = remote.read_range(self._path, 0, int(about["size"]))
        except (FileNotFoundError, remote.TransferError):  # gone, or just replaced by a longer or shorter one
            return None, "0"
        return owner_of(text), str(about["generation"])

    def _beat(self) -> None:
        while not self._over.wait(self._beat_s):
            with contextlib.suppress(remote.RemoteError), self._beating:  # away for now
                self._write()
