"""The whole quickstart with its own tasks, at the smallest size: every stage runs, table and page are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from configs.reading import ROOT
from configs.tables.quickstart import SECONDS as BY_SIZE
from mllm4d_jax.quickstart.results import ROWS

SECONDS = BY_SIZE["smoke"]


@pytest.mark.slow
def test_the_smallest_size_runs_from_the_first_stage_to_the_page(tmp_path, tiny_world):
    command = [sys.executable, "run.py", "--config=configs/quickstart.py:smoke", f"--workdir={tmp_path}/out"]
    command.append(f"--config.base={tiny_world[0]}")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert all(f"\n{name} " in done.stdout for name in ROWS.values())
    records = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert list(records) == list(SECONDS) and all(one["results"] and one["seconds"] > 0 for one in records.values())
    assert "The paper in miniature" in (tmp_path / "out" / "report.html").read_text()
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count(": done before, ") == len(SECONDS)
