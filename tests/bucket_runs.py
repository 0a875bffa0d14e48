"""Runs of `run.py` whose folder is in a bucket that answers badly, killed again and again, and what they leave."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import ml_collections

from mllm4d_jax.files import remote
from mllm4d_jax.report.reading import METRICS
from mllm4d_jax.run import saved
from tests.processes import Processes, write_config

FAULTS = ("429", "503", "slow", "cut")  # that a bucket recovers from
CLOCK = (
    "_s",
    "_per_s",
    "per_s_device",
    "mfu",
    "gib",
    "data_wait",
    "compiles",
)  # ends of columns, from run to run others


def whole(config: ml_collections.ConfigDict, there: str, outputs: Path, name: str, timeout: float = 3600) -> str:
    """Run to the end; what it printed."""
    with Processes(write_config(outputs / f"{name}.py", config), there, outputs=outputs) as run:
        assert run.wait(timeout) == [0], run.text()
        return run.text()


def killed(config: ml_collections.ConfigDict, there: str, outputs: Path, name: str, kills: int) -> str:
    """Train to the end, killed so many times, each time after another checkpoint; what was printed at last."""
    draw, file, folder = random.Random(kills), write_config(outputs / f"{name}.py", config), f"{there}/checkpoints"
    for n in range(kills):
        before = newest(folder)
        with Processes(file, there, outputs=outputs) as run:
            end = time.monotonic() + 1800  # beside other work a start may take minutes
            while newest(folder) <= before:
                assert run.running[0].poll() is None, f"ended before kill {n + 1}:\n{run.text()}"
                assert time.monotonic() < end, run.text()
                time.sleep(0.2)
            time.sleep(draw.random())
            assert run.running[0].poll() is None, f"ended before kill {n + 1}:\n{run.text()}"
    return whole(config, there, outputs, name)


def killed_at_times(
    config: ml_collections.ConfigDict, there: str, outputs: Path, name: str, seconds: tuple[float, ...]
) -> str:
    """As `killed`, after so many seconds each time."""
    file = write_config(outputs / f"{name}.py", config)
    for n, pause in enumerate(seconds):
        with Processes(file, there, outputs=outputs) as run:
            time.sleep(pause)
            assert run.running[0].poll() is None, f"ended before kill {n + 1}:\n{run.text()}"
    return whole(config, there, outputs, name)


def wait_for(sign: Callable[[], bool], run: Processes, timeout: float = 1800) -> None:
    """Return once there is a sign; raises AssertionError with what the processes printed."""
    end = time.monotonic() + timeout
    while not sign():
        assert time.monotonic() < end, run.text()
        time.sleep(0.1)


def newest(folder: str) -> int:
    """The newest step in a folder of checkpoints, 0 without one."""
    return max(saved.steps(remote.place(folder)), default=0)


def rows(folder: str | Path, name: str = METRICS) -> list[dict]:
    """Rows of a log without what depends on the clock or the device."""
    lines = (remote.place(folder) / name).read_bytes().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(CLOCK) and "time/" not in key}
        for line in lines
    ]
