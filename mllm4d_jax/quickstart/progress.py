"""How far the stages are: the share of one that is done, the time that is left, and the line that says so."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections

from mllm4d_jax.quickstart.stages import WIDTH
from mllm4d_jax.report.reading import METRICS, PREDICTIONS

PRIOR_S = 60.0  # weight of the stated times against the measured ones
QUIET_S = 30.0  # between two lines where there is no terminal

Share = Callable[[], float | None]


def share_of(config: ml_collections.ConfigDict, folder: Path) -> Share:
    """Return what says how much of a stage is done, from 0 to 1, by what it has written; None where nothing tells."""
    if "train" in config:
        return lambda: _lines(folder / METRICS) / config.train.steps
    if config.task == "eval":
        questions = len(json.loads(Path(config.data.path).read_bytes()))
        return lambda: _lines(folder / PREDICTIONS) / questions
    if config.task == "export" or config.source == "cold_start":
        return lambda: None
    clips = config.synthetic.clips
    if config.source != "synthetic":
        clips = sum(name.endswith("-captions.json") for name in os.listdir(config.input))
    clips *= 1 + len(config.forms)
    return lambda: len(os.listdir(folder / "parts")) / clips if (folder / "parts").is_dir() else 0.0


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


class TimeLeft:
    """Estimates the time that is left, from stated times of all turns and measured ones of those that are over.

    In a turn one stage is done, or a group of them at the same time.
    """

    def __init__(self, stated: Sequence[float]) -> None:
        """`stated`: seconds of every turn, in order."""
        self._stated, self._measured = list(stated), dict[int, float]()

    def done(self, turn: int, seconds: float) -> None:
        """Take note of the time that a turn took, all its parts together."""
        self._measured[turn] = seconds

    def left(self, turn: int, elapsed: float, before: float | None, share: float | None) -> tuple[float, float]:
        """Return seconds that are left of a turn, and of all.

        Args:
          turn: number of the one under way; those before it are over.
          elapsed: seconds since it was begun, or gone on with.
          before, share: how much of it was done then, and is done now; None where that is not known.
        """
        # What a turn begins with takes time in which nothing is done: its own pace counts as far as it is done.
        pace = (PRIOR_S + sum(self._measured.values())) / (PRIOR_S + sum(self._stated[n] for n in self._measured))
        gain = 0.0 if share is None or before is None else share - before
        rest = max(self._stated[turn] * pace * (1 - (before or 0.0)) - elapsed, 0.0)
        if gain > 0:  # its own pace would give elapsed * (1 - share) / gain
            rest = (1 - gain) * rest + elapsed * (1 - share)
        return rest, rest + pace * sum(self._stated[n] for n in range(turn + 1, len(self._stated)))


class StatusLine:
    """Says how far a stage is: over and over on one line of a terminal, now and then on a line of its own elsewhere."""

    def __init__(self) -> None:
        self._live, self._said, self._printing = sys.stdout.isatty(), time.monotonic(), threading.Lock()

    def show(self, text: str) -> None:
        """Show a state; elsewhere than on a terminal only if `QUIET_S` have gone by."""
        if self._live:
            columns = min(WIDTH, shutil.get_terminal_size().columns - 1)
            with self._printing:
                print(f"\r\033[K{text[:columns]}", end="", flush=True)
        elif time.monotonic() - self._said >= QUIET_S:
            self.say(text)

    def say(self, text: str) -> None:
        """Print lines that stay; threads may."""
        with self._printing:
            print(f"\r\033[K{text}" if self._live else text, flush=True)
            self._said = time.monotonic()


def span(seconds: float) -> str:
    """Return a time as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
