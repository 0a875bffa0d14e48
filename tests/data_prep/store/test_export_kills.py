"""What of released files survives a kill -9, while clips are worked on and while their files are put together."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.store.export import MANIFEST
from tests.data_prep.store.test_export import contents

ROOT = Path(__file__).resolve().parents[3]
CHILD = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}]
from data_prep.store.export import check_result, assemble
from data_prep.store.parts import ClipResult, PartStore, process_clips
from tests.data_prep.store.test_export import OUTPUTS, make_row

FOLDER, WORKERS = Path(sys.argv[1]), int(sys.argv[2])
CLIPS = [f"k{{n:03d}}" for n in range(60)]


def work(clip_id):
    with open(FOLDER / "log", "a") as log:
        log.write(f"{{os.getpid()}} {{clip_id}}\\n")
    time.sleep(0.02)
    n = int(clip_id[1:])
    rows = tuple(make_row(clip_id, i, f"s{{n}}") for i in range(20))
    return ClipResult(clip_id, f"s{{n}}", "bench" if n % 7 == 0 else "train", rows)


if __name__ == "__main__":
    with PartStore(FOLDER / "work", seed=1, config={{}}) as store:
        process_clips(CLIPS, work, store, workers=WORKERS, check=check_result)
        while True:
            assemble(store, CLIPS, FOLDER / "out", OUTPUTS)
            if sys.argv[3] == "once":
                break
"""


def start(tmp_path, folder, workers, mode):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(ROOT)))
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, str(script), str(folder), str(workers), mode])


def finished_parts(folder):
    found = folder / "work" / "parts"
    return {p.stem for p in found.glob("*.json")} if found.exists() else set()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the child made no progress"
        time.sleep(0.002)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kill_nine_at_five_random_moments_loses_no_clip_and_repeats_none(tmp_path, workers):
    rng, folder = random.Random(workers), tmp_path / "killed"
    for kill in range(5):
        before = finished_parts(folder)
        (folder / "log").unlink(missing_ok=True)
        child = start(tmp_path, folder, workers, "once")
        target = min(59, len(before) + rng.randint(1, 9))
        wait_for(lambda target=target: len(finished_parts(folder)) >= target)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, f"kill {kill} came too late"
        worked = [line.split() for line in (folder / "log").read_text().splitlines()]
        wait_for(lambda worked=worked: not any(alive(pid) for pid, _ in worked), 5)
        assert not before & {clip for _, clip in worked}, "a finished clip was done again"
        assert before <= finished_parts(folder), "a finished clip is gone"
    assert start(tmp_path, folder, workers, "once").wait() == 0
    assert start(tmp_path, tmp_path / "clean", 1, "once").wait() == 0
    assert contents(folder / "out") == contents(tmp_path / "clean" / "out")
    assert contents(folder / "work" / "parts") == contents(tmp_path / "clean" / "work" / "parts")
    ids = [r["id"] for n in ("train", "bench") for r in json.loads((folder / "out" / f"{n}.json").read_bytes())]
    assert len(ids) == len(set(ids)) == 60 * 20


def test_kill_nine_while_assembling_never_leaves_a_manifest_that_lies(tmp_path):
    rng, folder, states = random.Random(0), tmp_path / "run", []
    assert start(tmp_path, folder, 1, "once").wait() == 0
    final = contents(folder / "out")
    for _ in range(5):
        child = start(tmp_path, folder, 1, "for ever")
        inode = os.stat(folder / "out" / "train.json").st_ino
        wait_for(lambda inode=inode: os.stat(folder / "out" / "train.json").st_ino != inode)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        found = {n: d for n, d in contents(folder / "out").items() if not n.endswith(".partial")}
        states.append(MANIFEST in found)
        assert all(final[name] == data for name, data in found.items())
    assert start(tmp_path, folder, 1, "once").wait() == 0
    assert contents(folder / "out") == final
    assert not all(states), "every kill hit the moment between two assemblies"
