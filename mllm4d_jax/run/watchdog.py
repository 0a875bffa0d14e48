"""A run that hangs says where, and ends.

One stuck process leaves all the others of a run waiting in a collective without a word. The training thread tells the
watchdog what it is about to wait for; a thread of the watchdog's own looks at the clock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

EXIT_CODE = 75  # "try again later": the newest checkpoint is good


class Watchdog:
    """Ends the process once a phase takes longer than the limit. Use as a context manager."""

    def __init__(self, limit_s: float, end: Callable[[int], object] = os._exit) -> None:
        """
        Args:
          limit_s: seconds; 0 = never. Has to be longer than a compilation and than a clip's decoding limit.
          end: called with EXIT_CODE. The default leaves without clean-up, which would hang too.
        """
        self.limit_s, self._end = limit_s, end
        self._now: tuple[str, float] | None = None  # replaced whole, so that the thread never sees half of it
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.limit_s:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self.limit_s:
            self._thread.join()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the training thread does inside the block, e.g. "waiting for data". Blocks do not nest."""
        self._now = (name, time.monotonic())
        try:
            yield
        finally:
            self._now = None

    def progress(self) -> None:
        """Start the time of the phase anew: a part of it is done."""
        now = self._now
        self._now = now and (now[0], time.monotonic())

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit_s / 4)):
            now = self._now
            if now is not None and time.monotonic() - now[1] > self.limit_s:
                self._report(now[0])
                self._end(EXIT_CODE)
                return

    def _report(self, phase: str) -> None:
        print(
            f"error: no progress for {self.limit_s:g} s (train.watchdog_s) while {phase}; this process ends now, and "
            "the same command goes on from the newest checkpoint. What every thread was doing:",
            file=sys.stderr,
            flush=True,
        )
        try:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        except (AttributeError, ValueError, OSError):  # stderr was replaced by something that is no file
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
