"""How much of a stage is done and how long the rest takes, in closed form; memory of a group of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from configs import common
from mllm4d_jax.quickstart import progress
from mllm4d_jax.quickstart.process import group_memory
from mllm4d_jax.quickstart.progress import PRIOR_S, TimeLeft, share_of, span


def test_the_time_left_goes_from_what_is_stated_to_what_is_measured():
    clock = TimeLeft([100.0, 100.0, 50.0])
    assert clock.left(0, 0.0, 0.0, 0.0) == (100.0, 250.0)
    assert clock.left(0, 30.0, None, None) == (70.0, 220.0)
    clock.done(0, 200.0)  # twice as slow as stated
    pace = (PRIOR_S + 200) / (PRIOR_S + 100)
    assert clock.left(1, 0.0, 0.0, 0.0) == (pytest.approx(100 * pace), pytest.approx(150 * pace))
    # Half of it in 90 s: as much again by its own pace, the rest of what was stated by that; the mean of both.
    rest = (90 + 100 * pace - 90) / 2
    assert clock.left(1, 90.0, 0.0, 0.5) == (pytest.approx(rest), pytest.approx(rest + 50 * pace))
    # Gone on with at 60 %: 20 points in 10 s.
    assert clock.left(1, 10.0, 0.6, 0.8)[0] == pytest.approx(0.8 * (40 * pace - 10) + 0.2 * 10)
    assert clock.left(1, 500.0, 0.0, 1.0)[0] == 0
    assert clock.left(2, 1e6, None, None) == (0.0, 0.0)


def test_shares_follow_the_files_of_each_task(tmp_path):
    config = common.config("sft", {"train.steps": 4})
    share = share_of(config, tmp_path)
    assert share() == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert share() == 0.5
    (tmp_path / "asked.json").write_text(json.dumps([{}] * 8))
    share = share_of(common.config("eval", {"data.path": str(tmp_path / "asked.json")}), tmp_path)
    (tmp_path / "predictions.jsonl").write_text("{}\n{}\n")
    assert share() == 0.25
    share = share_of(common.config("curate", {"synthetic.clips": 5}), tmp_path)
    assert share() == 0
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.json").touch()
    (tmp_path / "a-captions.json").touch()
    (tmp_path / "b-captions.json").touch()
    assert share() == 0.2
    assert share_of(common.config("curate", {"source": "stereo", "input": str(tmp_path)}), tmp_path)() == 0.5
    formed = {"source": "stereo", "input": str(tmp_path), "forms": ("mirrored", "backwards", "mirrored_backwards")}
    assert share_of(common.config("curate", formed), tmp_path)() == 0.125
    assert share_of(common.config("curate", {"source": "cold_start"}), tmp_path)() is None


def test_elsewhere_than_on_a_terminal_lines_are_plain_and_few(capsys, monkeypatch):
    line = progress.StatusLine()
    line.show("now")
    line.say("done")
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    line.show("later")
    assert capsys.readouterr().out == "done\nlater\n"


def test_on_a_terminal_one_line_is_written_over(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    line = progress.StatusLine()
    line.show("x" * 500)
    line.say("done")
    shown, said = capsys.readouterr().out.split("\r\033[K")[1:]
    assert len(shown) <= progress.WIDTH and said == "done\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (605, "10:05"), (3661, "1:01:01")])
def test_times_are_read_at_a_glance(seconds, text):
    assert span(seconds) == text


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_memory_is_of_all_processes_of_the_group():
    code = "import subprocess, sys; x = bytearray(60 << 20); print(flush=True); {} sys.stdin.read()"
    inner = "subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=0, stdout=1);"
    for many, low in (("", 60), (inner, 120)):
        with subprocess.Popen(
            [sys.executable, "-c", code.format(many), code.format("")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        ) as process:
            for _ in range(2 if many else 1):
                process.stdout.readline()
            found = group_memory(process.pid) / 2**20
            process.stdin.close()
            assert low < found < low + 60
