"""What goes wrong in Orbax's threads while a checkpoint is written."""

from __future__ import annotations

import logging
import sys
from typing import Any, Self

from absl import logging as absl_logging

from mllm4d_jax.files.storage import of_disk


class BackgroundErrors(logging.Filter):
    """Keeps the first error of Orbax's threads, which would else show up only when the next checkpoint is due. Use as a
    context manager: their log of it is left out inside, and after an error for good, since it is raised.

    Attributes:
      first: None without any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first: BaseException | None = None
        self._hook = sys.unraisablehook

    def __enter__(self) -> Self:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        for logger in self._loggers():
            for earlier in [one for one in logger.filters if isinstance(one, BackgroundErrors)]:
                logger.removeFilter(earlier)  # one that has failed, see below
            logger.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self.first is not None:
            return  # writes that failed beside the first say so when they are freed, at the end of the process
        for logger in self._loggers():
            logger.removeFilter(self)
        sys.unraisablehook = self._hook

    @staticmethod
    def _loggers() -> tuple[logging.Logger, ...]:
        return absl_logging.get_absl_logger(), logging.getLogger("asyncio")

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR or not record.exc_info:
            return True
        if "orbax" not in record.pathname and of_disk(record.exc_info[1], "") is None:
            return True
        self.first = self.first or record.exc_info[1]
        return False

    def _unraisable(self, problem: Any) -> None:
        # After a failed write, TensorStore reports the others to a loop that is gone.
        if not (isinstance(problem.exc_value, RuntimeError) and "loop is closed" in str(problem.exc_value)):
            self._hook(problem)
