"""The campaign of interrupted runs, in small. The whole one is `python benchmarks/resume_campaign.py`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills", "devices"),
    [("kill", 2, 1), ("term", 1, 1), ("mesh", 1, 4)],
)
def test_interrupted_runs_end_where_the_unbroken_one_does(tmp_path, kind, kills, devices):
    command = [sys.executable, "benchmarks/resume_campaign.py", f"--kills={kills}", "--steps=10", f"--only={kind}"]
    command += [f"--devices={devices}", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"| {kind} | " in done.stdout and "\nas it should be" in done.stdout
