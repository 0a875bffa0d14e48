"""A run that hangs, or that has lost a process, says where, and ends.

One stuck process leaves all the others of a run waiting in a collective without a word. The training thread tells the
watchdog what it is about to wait for; a thread of the watchdog's own looks at the clock. A process that is gone breaks
the connections of the others, or JAX aborts them (when it was the first one, or after 100 s without a sign of life):
then what every process was doing is said by a child of it, which outlives it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import jax

EXIT_CODE = 75  # "try again later": the newest checkpoint is good
SEVERAL_S = 1800.0  # limit of a run of several processes that sets none
_GOES_ON = "the same command goes on from the newest checkpoint"
# What JAX raises on the processes that are left: of Gloo (CPU), NCCL (GPU), the network, the coordination service.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket closed|heartbeat|coordination|unavailable", re.I
)
# Reads phases, a line each, and says the last one when the process that writes them is gone without a last empty line.
_LAST_WORDS = """
import sys
last = ""
for line in sys.stdin:
    last = line.strip()
if last:
    print(f"error: {sys.argv[1]} was ended from outside while {last}; {sys.argv[2]}", file=sys.stderr, flush=True)
"""


class Watchdog:
    """Ends the process once a phase takes too long or another process is gone. Use as a context manager."""

    def __init__(
        self, limit_s: float, end: Callable[[int], object] = os._exit, process: int = 0, processes: int = 1
    ) -> None:
        """
        Args:
          limit_s: seconds; 0 = never, below it SEVERAL_S with several processes and never with one. Has to be longer
            than a compilation and than a clip's decoding limit.
          end: called with EXIT_CODE. The default leaves without clean-up, which would hang too.
          process, processes: which of how many share the run.
        """
        self.limit_s = limit_s if limit_s >= 0 else SEVERAL_S * (processes > 1)
        self._end, self._several, self._name = end, processes > 1, f"process {process} of {processes}"
        self._last_words: subprocess.Popen | None = None
        self._now: tuple[str, float] | None = None  # replaced whole, so that the thread never sees half of it
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.limit_s:
            self._thread.start()
        if self._several:
            command = [sys.executable, "-S", "-c", _LAST_WORDS, self._name, _GOES_ON]
            self._last_words = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
            )
            self._tell("the run began")
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self.limit_s:
            self._thread.join()
        self._tell("")
        if self._last_words is not None:
            with contextlib.suppress(OSError):
                self._last_words.communicate()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the training thread does inside the block, e.g. "waiting for data". Blocks do not nest."""
        self._now = (name, time.monotonic())
        self._tell(name)
        try:
            yield
        except Exception as error:
            if self._several and lost(error):
                print(f"error: {self._name} lost another process while {name}; {_GOES_ON}", file=sys.stderr)
                print(f"({' '.join(str(error).split())[:300]})", file=sys.stderr, flush=True)
                self._tell("")
                self._end(EXIT_CODE)
            raise
        finally:
            self._now = None
            self._tell(f"nothing was waited for, after {name}")

    def _tell(self, phase: str) -> None:
        """Have the child know the phase, '' for an end that needs no word of it."""
        if self._last_words is not None:
            with contextlib.suppress(OSError):  # the child is gone: nothing that a run has to end for
                self._last_words.stdin.write(f"{phase}\n")
                self._last_words.stdin.flush()

    def progress(self) -> None:
        """Start the time of the phase anew: a part of it is done."""
        now = self._now
        self._now = now and (now[0], time.monotonic())

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit_s / 4)):
            now = self._now
            if now is not None and time.monotonic() - now[1] > self.limit_s:
                self._report(now[0])
                self._tell("")
                self._end(EXIT_CODE)
                return

    def _report(self, phase: str) -> None:
        print(
            f"error: no progress for {self.limit_s:g} s (train.watchdog_s) while {phase}; {self._name} ends now, and "
            f"{_GOES_ON}. What every thread was doing:",
            file=sys.stderr,
            flush=True,
        )
        try:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        except (AttributeError, ValueError, OSError):  # stderr was replaced by something that is no file
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)


def lost(error: Exception) -> bool:
    """Whether an error of JAX says that another process of the run is gone, and not of anything in this one."""
    of_jax = type(error) in (ValueError, RuntimeError) or isinstance(error, jax.errors.JaxRuntimeError)
    return of_jax and _LOST.search(str(error)) is not None
