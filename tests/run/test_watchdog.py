"""A hanging run says where and ends."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import time

import pytest

from configs import sft
from mllm4d_jax.run import loop
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


OF_TWO = """
import os, signal, sys
from mllm4d_jax.run.watchdog import Watchdog

with Watchdog(-1, process=1, processes=2) as watchdog:
    with watchdog.phase("drawing completions for step 7"):
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "lost":
            raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1249")
        if sys.argv[1] == "broken":
            raise KeyError("connection closed")
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("killed", -9, "error: process 1 of 2 was ended from outside while drawing completions for step 7; the same"),
        (
            "lost",
            EXIT_CODE,
            "error: process 1 of 2 lost another process while drawing completions for step 7; the same",
        ),
        ("broken", 1, "KeyError: 'connection closed'"),
        ("ended", 0, ""),
    ],
)
def test_one_of_two_processes_says_how_it_ends(how, code, said):
    """stderr is read to its end, which comes when the child that outlives a killed process is gone, too."""
    done = subprocess.run([sys.executable, "-c", OF_TWO, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stderr
    assert ("error: " in done.stderr) == (how in ("killed", "lost"))


def test_only_several_processes_have_a_limit_that_nobody_set():
    assert Watchdog(-1).limit_s == 0 and Watchdog(-1, processes=2).limit_s == 1800
    assert Watchdog(0, processes=2).limit_s == 0 and Watchdog(5).limit_s == 5


def test_progress_within_a_phase_starts_its_time_anew():
    ended = []
    with Watchdog(0.4, ended.append) as watchdog, watchdog.phase("evaluating"):
        for _ in range(4):
            time.sleep(0.2)
            watchdog.progress()
    assert not ended


@pytest.mark.parametrize(
    ("stuck", "phase"),
    [("prepare", "looking for what the run needs"), ("set_up", "opening records, loading weights and checkpoint")],
)
def test_a_run_is_watched_before_its_first_step(tmp_path, monkeypatch, capfd, stuck, phase):
    """Where it hangs in what a task does before training, the watchdog ends it and names the phase."""
    ended, config = threading.Event(), sft.get_config("tiny")
    config.train.watchdog_s = 0.5
    monkeypatch.setattr(loop, "Watchdog", functools.partial(Watchdog, end=lambda code: ended.set()))

    def hang(*args):
        assert ended.wait(20), "nobody has noticed"
        raise KeyError("over")

    steps = {"prepare": lambda config, folder: config, "set_up": None} | {stuck: hang}
    with pytest.raises(KeyError, match="over"):
        loop.carry_out(config, str(tmp_path / "run"), (), *steps.values(), None)
    assert f"no progress for 0.5 s (train.watchdog_s) while {phase}; process 0 of 1 ends" in capfd.readouterr().err
