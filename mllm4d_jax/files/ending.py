"""The end of a program, which is to come: threads and worker processes that never return do not hold it up."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

LIMIT_S = 120.0  # a checkpoint that is being written may take that long


@contextlib.contextmanager
def bound_exit(limit_s: float = LIMIT_S) -> Iterator[None]:
    """End the process, with its exit code, if it is still there so long after the block was left by an exception.

    For the outermost block of a program, which leaves by `sys.exit` or by an error. Says what every thread was doing.
    """
    over, code = threading.Event(), [1]

    def watch() -> None:
        over.wait()
        time.sleep(limit_s)
        said = f"the work ended {limit_s:g} s ago but the process does not: it is ended now. Its threads:"
        print(said, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(code[0])

    # Started now: when memory has run out, no thread can be started any more.
    threading.Thread(target=watch, name="exit", daemon=True).start()
    try:
        yield
    except SystemExit as leaving:
        code[0] = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        over.set()
