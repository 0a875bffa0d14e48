"""How far a run is, and what ends it: a number that is not finite, or a signal."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading

log = logging.getLogger(__name__)


class TrainingError(ValueError):
    """Training cannot go on; the message names the step and the records."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is; counts are over all processes, so that another number of them can go on.

    Attributes:
      step: optimiser steps done.
      position: groups of questions consumed, the loader's whole state (see `data.loader`).
      rejected: records that could not be used.
    """

    step: int = 0
    position: int = 0
    rejected: int = 0


class StopSignal:
    """True once SIGINT or SIGTERM came in; a second SIGINT interrupts at once. Use as a context manager.

    Outside the main thread, where Python allows no handlers, it stays False.
    """

    def __init__(self) -> None:
        self._asked, self._before = False, {}

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
