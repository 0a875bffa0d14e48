"""The end of a program: it is asked to stop, and threads and worker processes that never return do not hold it up."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Self

EXIT_S = 60.0  # for the end of the process, once all is closed
CLOSING_S = 120.0  # for closing after an error, when a checkpoint may still be under way

log = logging.getLogger(__name__)


class Ending:
    """Ends the process where closing down takes too long, and says what every thread was doing.

    Its thread is started with it: when memory has run out, no thread can be started any more. As a context manager, it
    is around everything that has to be closed.
    """

    def __init__(self, limit_s: float, end: Callable[[int], object] = os._exit) -> None:
        """`end`: called with the exit code; the default leaves without clean-up, which is what hangs."""
        self._limit_s, self._end, self._code = limit_s, end, 1
        self._begun, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="ending", daemon=True).start()

    def begin(self, code: int = 1) -> None:
        """Let the time run from now on; `code`: that the process would end with."""
        self._code = code
        self._begun.set()

    @contextlib.contextmanager
    def after_errors(self) -> Iterator[None]:
        """Let the time run once the block is left by an error, before what is around it is closed."""
        try:
            yield
        except BaseException:
            self.begin()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """All is closed."""
        self._over.set()
        self._begun.set()

    def _watch(self) -> None:
        self._begun.wait()
        if self._over.wait(self._limit_s):
            return
        said = f"error: closing down takes longer than {self._limit_s:g} s: this process ends now. Its threads:"
        print(said, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        self._end(self._code)


class StopSignal:
    """True once SIGINT, SIGTERM or SIGHUP came in; a second SIGINT interrupts at once. Use as a context manager.

    A terminal that is closed sends SIGHUP; where that is ignored, as by `nohup`, it stays so.

    Outside the main thread, where Python allows no handlers, it stays False.
    """

    def __init__(self) -> None:
        self._asked, self._before = False, {}

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            hang_up = [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
            for number in (signal.SIGINT, signal.SIGTERM, *hang_up):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        log.warning("%s: finishing the step under way, then saving", signal.Signals(number).name)
