"""Whole runs that take minutes: learning on three seeds, the leash of the KL term, processes that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mllm4d_jax.files.jsonl import read_steps
from mllm4d_jax.grpo import task as grpo
from tests.grpo.grpo_cases import final, make_config, same_bits

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def one_device(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_rise(one_device, tiny_world, tmp_path, capsys, seed):
    """From below .4 to above .9; prints the seconds of CPU it took, compilation included."""
    started = time.process_time()
    config = make_config(tiny_world, rollout__prompts=4)
    config.seed, config.train.steps, config.train.checkpoint_every = seed, 150, 1000
    assert grpo.run(config, str(tmp_path)) == 0
    rows = read_steps(tmp_path / "metrics.jsonl")
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:5], rows[-10:]))
    with capsys.disabled():
        taken, reached = time.process_time() - started, next(r["step"] for r in rows if r["reward"] > 0.9)
        print(
            f"\nseed {seed}: reward {first:.3f} -> {last:.3f} in {len(rows)} steps, above .9 from {reached} on, "
            f"{taken:.0f} s of CPU"
        )
    assert first < 0.4 and last > 0.9


def test_the_kl_term_keeps_the_policy_near_its_start(one_device, tiny_world, tmp_path, capsys):
    """The stronger it is, the nearer; with a weight of 1 the divergence stays below .2 nats a token."""
    found = []
    for beta in (0.01, 1.0):
        folder = tmp_path / str(beta)
        config = make_config(tiny_world, rollout__prompts=4, objective__beta=beta)
        config.train.steps, config.train.checkpoint_every = 80, 1000
        assert grpo.run(config, str(folder)) == 0
        found.append(max(row["kl"] for row in read_steps(folder / "metrics.jsonl")))
    with capsys.disabled():
        print(f"\nlargest KL in 80 steps: {found[0]:.3f} nats a token at beta .01, {found[1]:.3f} at beta 1")
    assert found[1] < 0.2 and found[0] > 2 * found[1]


@pytest.mark.parametrize("ahead", [0, 1])
def test_killed_processes_end_in_the_same_bits(tiny_world, tmp_path, ahead):
    """SIGKILL at random moments, as often as it takes to have met a checkpoint five times."""
    config = make_config(tiny_world, rollout__ahead=ahead, objective__beta=0.05, train__checkpoint_every=3)
    config.train.steps = 24
    file = tmp_path / "run_config.py"
    file.write_text(f"def get_config():\n    return {config.to_dict()!r}\n")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | cache

    def start(folder):
        command = [sys.executable, "run.py", f"--config={file}", f"--workdir={folder}"]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole = start(tmp_path / "whole")
    assert whole.wait(600) == 0, whole.stderr.read().decode()[-3000:]
    rng, folder, kills = random.Random(ahead), tmp_path / "killed", 0
    while kills < 5:
        process, began = start(folder), len(read_steps(folder / "metrics.jsonl"))
        deadline = time.monotonic() + 300
        while len(read_steps(folder / "metrics.jsonl")) < min(began + 3, 22) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()[-3000:]
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    process = start(folder)
    assert process.wait(600) == 0, process.stderr.read().decode()[-3000:]
    same_bits(final(folder), final(tmp_path / "whole"))


@pytest.mark.parametrize("axes", [dict(data=2), dict(data=1, fsdp=4)], ids=str)
def test_several_devices_take_the_same_steps(tiny_world, tmp_path, monkeypatch, axes):
    """Learning on weights that are split over all devices, sampling on a second mesh where they are not."""
    rows = []
    for n, chosen in enumerate((dict(data=1), axes)):
        count = int(np.prod(list(chosen.values())))
        devices = jax.local_devices()[:count]
        monkeypatch.setattr(jax, "devices", lambda *_, d=devices: d)
        config = make_config(tiny_world, rollout__prompts=4, learner__completions_per_row=4)
        config.mesh.update(dict(data=1, fsdp=1, tensor=1) | chosen)
        config.rollout.tensor = 2 if chosen.get("fsdp", 1) > 1 else 0
        config.train.steps = 3
        assert grpo.run(config, str(tmp_path / str(n))) == 0
        rows.append(read_steps(tmp_path / str(n) / "metrics.jsonl"))
    for a, b in zip(*rows, strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-5) and b["gap_max"] < 1e-3
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
