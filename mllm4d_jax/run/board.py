"""Figures for TensorBoard, written at once: no thread or queue that a full disk could leave waiting."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

log = logging.getLogger(__name__)


class Board:
    """An event file in a folder, made if need be. Where it cannot be written any more, it says so once and is silent:
    the run has the same figures in metrics.jsonl.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """`purge_step`: what an earlier part of the run wrote of this step and later ones is not to be shown."""
        self._folder, self._file = folder, None
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))
        except OSError as problem:
            self._stop(problem)
        self._write(Event(wall_time=time.time(), step=purge_step, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.SessionStatus.START)
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step, each under its name."""
        for name, value in values.items():
            self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._do(EventsWriter.flush)

    def close(self) -> None:
        self._do(EventsWriter.close)
        self._file = None

    def _write(self, event: Event) -> None:
        self._do(EventsWriter.write_event, event)

    def _do(self, method, *args) -> None:
        try:
            if self._file is not None:
                method(self._file, *args)
        except OSError as problem:
            self._stop(problem)

    def _stop(self, problem: OSError) -> None:
        log.warning("no more figures for TensorBoard: %s: %s", self._folder, problem.strerror)
        self._file = None
