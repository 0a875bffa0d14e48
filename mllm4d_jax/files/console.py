"""Standard output and error whose reader may go away, be it `head`, a closed terminal or a full disk: what a program
works for is in its files, and it does not end for want of a listener.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET)  # the reader; a terminal that was closed gives EIO


class Console:
    """A text stream that throws away what is written once writing has failed.

    Attributes:
      lost: the error of that; None while all is well.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        """`name`: of the stream, in the message that it is lost."""
        self._stream, self._name = stream, name
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def incomplete(self) -> str:
        """What was wrong, for an output that somebody wants to read later, e.g. in a file on a full disk; else ''."""
        return "" if self.lost is None or self.lost.errno in _GONE else f"{self._name}: {self.lost.strerror}"

    def _do(self, call: Callable[..., object], *args: object) -> None:
        try:
            call(*args)
        except OSError as problem:
            self.lost = problem
            # What is still in buffers, and what libraries write to the same number, goes nowhere without an error.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._name != "standard error":
                said = f"{self._name} is lost ({problem.strerror}): going on without it; logs are in the workdir"
                print(said, file=sys.stderr, flush=True)


def guard_console() -> Console:
    """Put a `Console` in place of standard output and error; return that of the output.

    Where they were closed by who started the program, they go nowhere; and no file that is opened later gets their
    numbers, into which libraries would then write.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout = Console(sys.stdout, "standard output")
    sys.stderr = Console(sys.stderr, "standard error")
    return sys.stdout
