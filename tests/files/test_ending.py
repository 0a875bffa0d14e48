"""A process ends, whatever its threads do."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mllm4d_jax.files.ending import Ending

ROOT = Path(__file__).parents[2]
HANGS = """
import sys, threading
import run
from mllm4d_jax.files import ending
run.EXIT_S = 0.5
def main(argv):
    threading.Thread(target=threading.Event().wait).start()  # as one of a library that waits for memory
    if argv[1] == "error":
        raise RuntimeError("the error")
    return int(argv[1])
run.main = main
sys.exit(run.run_program(sys.argv))
"""


@pytest.mark.parametrize(("argument", "code"), [("0", 0), ("1", 1), ("error", 1)])
def test_a_thread_that_never_ends_does_not_keep_the_process(argument, code):
    command = [sys.executable, "-c", HANGS, argument]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == code
    assert "closing down takes longer than 0.5 s" in found.stderr and "Thread 0x" in found.stderr
    assert ("RuntimeError: the error" in found.stderr) == (argument == "error")


def test_what_closes_in_time_is_left_alone():
    ended = []
    with pytest.raises(KeyError), Ending(0.2, ended.append) as ending, ending.after_errors():
        raise KeyError
    with Ending(0.1, ended.append) as ending, ending.after_errors():
        time.sleep(0.3)  # no error: as long as it takes
    time.sleep(0.4)
    assert not ended and "ending" not in [thread.name for thread in threading.enumerate()]


def test_closing_that_hangs_after_an_error_ends_the_process(capfd):
    ended = threading.Event()
    with pytest.raises(KeyError), Ending(0.1, lambda code: code == 1 and ended.set()) as ending:
        try:
            with ending.after_errors():
                raise KeyError
        finally:
            assert ended.wait(20)
    assert "closing down takes longer" in capfd.readouterr().err
