"""Which worker encodes which group since when: so that one that hangs or dies is told from the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np

_STILL = 1 << 62  # later than any moment


class ReaderClosedError(RuntimeError):
    """Nothing more is to be encoded. Ends what Grain runs; nobody else sees it."""


class Gate:
    """Lets a thread encode one group after the other, until it is closed; which waits for the one under way."""

    def __init__(self) -> None:
        self._lock, self._closed = threading.Lock(), False

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Holds the gate for a group. Raises ReaderClosedError after `close`."""
        with self._lock:
            if self._closed:
                raise ReaderClosedError
            yield

    def close(self) -> None:
        with self._lock:
            self._closed = True


class Roster:
    """A file that all processes map, with a row (pid, place of the group + 1, since when, closed) for each worker.

    What one writes the others see at once, and a worker that is killed can leave no lock behind. While its clock stands
    still, a worker is at work since `_STILL`. Made and closed by the main process; pickles into the workers.
    """

    def __init__(self, workers: int, path: str = "") -> None:
        """`path`: of the file; '' makes one."""
        self._workers, self._file = workers, None if path else tempfile.NamedTemporaryFile(prefix="loader-workers-")
        self._path, self._made = path or self._file.name, time.monotonic()
        self._rows = np.memmap(self._path, np.int64, "r+" if path else "w+", shape=(workers, 4))

    def __reduce__(self):
        return type(self), (self._workers, self._path)

    def enter(self, worker: int) -> None:
        """Notes that this process is worker number `worker`."""
        self._rows[worker, 0] = os.getpid()

    @contextlib.contextmanager
    def at_work(self, worker: int, place: int) -> Iterator[None]:
        """Notes that a worker encodes the group at `place` inside the block. Raises ReaderClosedError after `close`."""
        row = self._rows[worker]
        if row[3]:
            raise ReaderClosedError
        row[2], row[1] = time.monotonic_ns(), place + 1
        try:
            yield
        finally:
            row[1] = 0

    @contextlib.contextmanager
    def unwatched(self, worker: int) -> Iterator[None]:
        """Lets a worker's clock stand still inside the block, for what has a limit of its own; it then begins anew."""
        row = self._rows[worker]
        row[2] = _STILL
        try:
            yield
        finally:
            row[2] = time.monotonic_ns()

    def kill(self, longer_than_s: float | None = None) -> list[int]:
        """Kills the workers that encode a group, for so long or (None) at all; returns the places of these groups."""
        children = {child.pid: child for child in multiprocessing.active_children()}
        before = _STILL if longer_than_s is None else time.monotonic_ns() - int(longer_than_s * 1e9)
        slow = [(pid, place - 1) for pid, place, since, _ in self._rows.tolist() if place and since <= before]
        for pid, _ in slow:
            if pid in children:
                children[pid].kill()
        return [place for pid, place in slow if pid in children]

    def died(self) -> list[int]:
        """Returns the places of the groups that workers encoded when they died."""
        alive = {child.pid for child in multiprocessing.active_children()}
        return [place - 1 for pid, place, *_ in self._rows.tolist() if place and pid not in alive]

    def missing_for(self) -> float:
        """Returns the seconds that a worker has taken to start, 0 once all have."""
        return 0.0 if self._rows[:, 0].all() else time.monotonic() - self._made

    def close(self) -> None:
        """Lets no other group begin."""
        self._rows[:, 3] = 1
