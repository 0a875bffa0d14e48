"""Questions from a terminal or a pipe, line by line."""

from __future__ import annotations

import contextlib
import io
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from mllm4d_jax.qa.errors import RecordError

Line = tuple[int, str]  # number from 1, and what is written there


def standard_input() -> TextIO:
    """Return the program's input; an empty one where it was closed by who started the program."""
    return io.StringIO() if sys.stdin is None else sys.stdin


def typed_lines(stream: TextIO) -> Iterator[Line]:
    """Yield the lines that are not blank, as they come, until the input ends or its terminal goes away.

    At a terminal they are asked for, on standard error where the output goes elsewhere. What is not UTF-8 comes as half
    surrogate pairs, which are no text (`records.check_text`).
    """
    terminal = stream.isatty()
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="surrogateescape", **({} if terminal else {"encoding": "utf-8"}))
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` its editing and its history
        print("Questions about the clip, one a line; Ctrl-D ends.", file=sys.stderr, flush=True)
    for number in itertools.count(1):
        try:
            line = _asked_for() if terminal else stream.readline()
        except (EOFError, OSError):  # Ctrl-D, or a terminal that was closed
            print(file=sys.stderr, flush=True)  # below the prompt
            return
        if not (line or terminal):
            return
        if line.strip():
            yield number, line.strip()


def _asked_for() -> str:
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def converse(lines: Iterator[Line], ask: Callable[[int, str], None], terminal: bool) -> int:
    """Ask line by line; one that is no question is said, and the next one is taken.

    Ctrl-C at a terminal ends it as Ctrl-D does. A terminal that is closed ends it too, once the answer under way is
    there.

    Args:
      ask: called with number and text of a line; raises RecordError for what is no question.

    Returns:
      1 if a line of a file or a pipe was no question, else 0.
    """
    failed = 0
    with _without_hang_up():
        try:
            for number, text in lines:
                try:
                    ask(number, text)
                except RecordError as problem:
                    failed = 0 if terminal else 1
                    print(f"error: {problem}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(file=sys.stderr)
    return failed


@contextlib.contextmanager
def _without_hang_up() -> Iterator[None]:
    """Have a terminal that goes away end the input, not the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
