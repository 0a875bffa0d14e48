"""A hanging run says where and ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from mllm4d_jax.run.watchdog import EXIT_CODE, Watchdog

HANGING = """
import threading
from mllm4d_jax.run.watchdog import Watchdog

def stuck_in_the_loader():
    threading.Event().wait()

threading.Thread(target=stuck_in_the_loader, daemon=True).start()
with Watchdog(0.5) as watchdog, watchdog.phase("waiting for data"):
    threading.Event().wait()
"""


def test_a_hanging_process_ends_naming_the_phase_and_every_thread():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_CODE
    assert "no progress for 0.5 s (train.watchdog_s) while waiting for data" in done.stderr
    assert "in stuck_in_the_loader" in done.stderr and "newest checkpoint" in done.stderr


def test_progress_keeps_it_quiet():
    ended = []
    with Watchdog(0.4, ended.append) as watchdog:
        for _ in range(4):
            with watchdog.phase("a step"):
                time.sleep(0.15)
        time.sleep(0.8)  # between phases nothing is waited for
    assert not ended
    with Watchdog(0.2, ended.append) as watchdog, watchdog.phase("a step"):
        time.sleep(1.0)
    assert ended == [EXIT_CODE]


def test_without_a_limit_there_is_no_thread():
    before = threading.active_count()
    with Watchdog(0) as watchdog, watchdog.phase("anything"):
        assert threading.active_count() == before
