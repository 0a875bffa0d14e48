"""One stage as a process of its own, like the command that is printed for it: started, watched, stopped, measured.

Processes one after the other, rather than all stages in this one: each stage's peak of memory is its own, a GPU's
memory is free for the next, one that is stopped or dies takes nothing with it, and what a newcomer reads is what runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from configs.reading import ROOT

GRACE_S = 20.0  # for a process that is to stop; then it is ended, and goes on from what it last saved
_LOOK_S = 0.25  # between two looks at the process
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
      code: exit code; below 0 the signal that ended it.
      seconds: that it ran.
      peak_mib: most memory (resident) that it and its own processes had at a time; pages that they share count for
        each. Where the system does not tell of others, its own.
    """

    code: int
    seconds: float
    peak_mib: float


def run_process(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    stopped: Callable[[], bool],
    look: Callable[[float], None],
) -> Ended:
    """Run run.py with arguments and wait for its end; what it says is appended to a file.

    It has a process group of its own, so that a terminal's Ctrl-C comes to it once, from here.

    Args:
      environment: variables besides those of this process.
      stopped: whether it is to be asked to stop.
      look: called several times a second with the seconds since it began.
    """
    started, peak, told = time.monotonic(), 0.0, math.inf
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            process_group=0,
        )
    try:
        while (ended := _ended(process)) is None:
            peak = max(peak, group_memory(process.pid))
            if stopped() and told == math.inf:
                told = time.monotonic()
                process.send_signal(signal.SIGINT)
            if time.monotonic() - told > GRACE_S:
                os.killpg(process.pid, signal.SIGKILL)
            look(time.monotonic() - started)
            time.sleep(_LOOK_S)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
    return Ended(ended[0], time.monotonic() - started, max(peak, ended[1]) / _MIB)


def _ended(process: subprocess.Popen) -> tuple[int, float] | None:
    """Exit code and own peak of memory, bytes, once a process has ended."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def group_memory(group: int) -> float:
    """Return the resident bytes of all processes of a group; 0 where the system does not tell."""
    pages = 0
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):  # it is gone
                if os.getpgid(int(entry.name)) == group:
                    pages += int(Path(entry.path, "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
