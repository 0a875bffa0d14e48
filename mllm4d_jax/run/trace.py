"""Device traces (XProf) of chosen steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

import jax


class Trace:
    """Traces the steps it was given; neighbouring ones go into one trace. Use as a context manager.

    Look at it with `tensorboard --logdir DIR` and the package xprof, or at ui.perfetto.dev.
    """

    def __init__(self, folder: str | Path, steps: Collection[int]) -> None:
        """`steps`: counted from 1, as everywhere in a run's output."""
        self._folder, self._steps, self._on = Path(folder), frozenset(steps), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Call before a step is sent to the devices."""
        if step in self._steps and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, wait: Callable[[], object]) -> None:
        """Call after a step was sent. `wait` returns once it is done; it is called before a trace ends."""
        if self._on and step + 1 not in self._steps:
            wait()
            self._stop()

    def _stop(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
