"""Several real processes on one machine give the run of a single one, and go on from it and from each other."""

from __future__ import annotations

import json
import random
import signal
import time

import jax
import numpy as np
import pytest

from mllm4d_jax.files.jsonl import of_all_hosts, read_steps
from mllm4d_jax.grpo import task as grpo
from mllm4d_jax.grpo.prompts import share_out
from mllm4d_jax.run.checkpoint import Checkpoints
from mllm4d_jax.run.watchdog import EXIT_CODE
from tests.grpo.grpo_cases import final, make_config, same_bits
from tests.processes import Processes, write_config

SAME = ("step", "completion_tokens", "completion_tokens_max", "position", "quarantined", "staleness", "truncated")
HOWS = ("lost another process", "was ended from outside")
UNEVEN = {"rollout__stop": ("a", "e", "o", "1"), "rollout__max_new_tokens": 16, "rollout__buckets": (16,)}
FULL = {
    "rollout__prompts": 4,
    "learner__completions_per_row": 4,
    "train__accumulation": 2,
    "objective__beta": 0.05,
    "eval__every": 2,
}
CASES = {
    "uneven lengths": FULL | UNEVEN,
    "ahead": FULL | {"rollout__ahead": 1, "rollout__prompts_at_once": 2},
    "dynamic sampling": {
        "reward": "only_directions",
        "rollout__prompts": 4,
        "objective__dynamic_sampling": "on",
        "rollout__max_rounds": 4,
        "eval__every": 2,
    },
}


@pytest.fixture
def mixed_world(tiny_world, tmp_path, monkeypatch):
    """The tiny world with an unusable record among its prompts; processes share their compiled programs."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    model, folder = tiny_world
    lines = (folder / "r1.jsonl").read_text().splitlines()
    bad = json.loads(lines[0]) | {"videos": ["videos/absent.mp4"]}
    (folder / "mixed.jsonl").write_text("\n".join([lines[0], json.dumps(bad), *lines[1:]]) + "\n")
    return model, folder


def config_of(world, **changes):
    config = make_config(world, **changes)
    config.data.path, config.data.max_quarantine_rate = str(world[1] / "mixed.jsonl"), 0.5
    config.eval.path, config.eval.limit, config.mesh.data = config.data.path, 5, -1
    config.optim.lr = 5e-4  # Adam takes a step of this size where a gradient is nothing but the rounding of its sums
    return config


def trained(config, workdir, count, devices):
    """Runs to the end over so many processes."""
    with Processes(write_config(workdir.with_suffix(".py"), config), workdir, count, devices) as run:
        assert run.wait(900) == [0] * count, run.text()
    return workdir


def completions(workdir):
    rows = [row for file in of_all_hosts(workdir / "completions.jsonl") for row in read_steps(file)]
    # In a small world the same question may come twice in a step.
    return sorted(rows, key=lambda row: (row["step"], row["key"], row["branch"], row["completion"]))


def assert_same_run(found, wanted):
    """The same completions token for token; losses and parameters to 1e-5."""
    ours, theirs = (read_steps(folder / "metrics.jsonl") for folder in (found, wanted))
    assert [[row[name] for name in SAME] for row in ours] == [[row[name] for name in SAME] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-12)
        for name, rel in (("loss", None), ("grad_norm", 1e-3)):  # null in a step that taught nothing
            assert (a[name] is None) == (b[name] is None)
            assert a[name] is None or a[name] == pytest.approx(b[name], rel=rel, abs=1e-5)
    ours, theirs = completions(found), completions(wanted)
    assert len(ours) == len(theirs) and {row["step"] for row in ours} == set(range(1, theirs[-1]["step"] + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a.pop("advantage") == pytest.approx(b.pop("advantage"), abs=1e-4)
        assert a == b
    assert read_steps(found / "evals.jsonl") == read_steps(wanted / "evals.jsonl")
    named = [
        {json.loads(line)["index"] for file in of_all_hosts(folder / "quarantine.jsonl") for line in file.open()}
        for folder in (found, wanted)
    ]
    assert named[0] == named[1] == {1}
    (step, ours), (last, theirs) = final(found), final(wanted)
    assert step == last
    for name, x in theirs.items():
        if name.startswith("trainable"):
            np.testing.assert_allclose(ours[name], x, atol=1e-5, err_msg=name)


def test_two_processes_take_the_steps_of_one(mixed_world, tmp_path, monkeypatch):
    """Completions of different lengths, and an unusable record, so that a prompt moves to another process."""
    changes = {"rollout__completions": 2, "rollout__chunk": 16, "train__steps": 2}
    config = config_of(mixed_world, **(UNEVEN | changes))
    config.seed, config.eval.path = 2, ""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    assert grpo.run(config, str(tmp_path / "one")) == 0
    assert_same_run(trained(config, tmp_path / "two", 2, 1), tmp_path / "one")
    assert len({row["tokens"] for row in completions(tmp_path / "one")}) > 2


def test_prompts_are_divided_evenly_and_few_move():
    assert share_out([0, 1, 0, 1], 2) == [[0, 2], [1, 3]]
    assert share_out([0, 0, 0, 1], 2) == [[0, 1], [3, 2]]
    assert share_out([2, 2, 2], 3) == [[1], [2], [0]]
    assert share_out([0, 0], 1) == [[0, 1]]


@pytest.mark.slow
def test_weights_that_are_split_over_all_devices(mixed_world, tmp_path):
    """Every process has all of them once more to sample with, on its own two devices."""
    config = config_of(mixed_world, **(FULL | {"rollout__tensor": 2, "train__steps": 3}))
    config.mesh.fsdp = 4
    assert_same_run(trained(config, tmp_path / "two", 2, 2), trained(config, tmp_path / "one", 1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_processes_gives_the_same_run(mixed_world, tmp_path, case):
    """Four devices throughout."""
    config = config_of(mixed_world, **(CASES[case] | {"train__steps": 4}))
    one = trained(config, tmp_path / "one", 1, 4)
    for count in (2, 4):
        assert_same_run(trained(config, tmp_path / f"{count}", count, 4 // count), one)


def killed(config, workdir, count, devices, victim, steps, rng):
    """A run over so many processes, one of which is killed some time after `steps` more steps; the exit codes."""
    before = len(read_steps(workdir / "metrics.jsonl"))
    with Processes(write_config(workdir.with_suffix(".py"), config), workdir, count, devices) as run:
        run.wait_for_steps(workdir, before + steps, timeout=600)
        time.sleep(rng.uniform(0, 1))
        run.running[victim].send_signal(signal.SIGKILL)
        codes = run.wait(180)
        # The first process has JAX's coordinator; without it the others are aborted at once.
        assert codes[victim] == -signal.SIGKILL, run.text()
        assert all(c in (EXIT_CODE, -signal.SIGABRT) for i, c in enumerate(codes) if i != victim), run.text()
        if count > 1:
            wait_for_words(run, count, victim)


def wait_for_words(run, count, victim):
    """Each says what it was doing; of one that was ended from outside, a child says it a moment later."""
    said = {i: [f"error: process {i} of {count} {how} while" for how in HOWS[i == victim :]] for i in range(count)}
    end = time.monotonic() + 60
    while not all(any(one in run.text() for one in ways) for ways in said.values()):
        assert time.monotonic() < end, run.text()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same_bits(mixed_world, tmp_path):
    config = config_of(mixed_world, **(FULL | {"rollout__ahead": 1, "train__steps": 14, "train__checkpoint_every": 2}))
    whole, folder, rng = trained(config, tmp_path / "whole", 2, 1), tmp_path / "killed", random.Random(0)
    for n in range(5):
        killed(config, folder, 2, 1, n % 2, 2, rng)
    same_bits(final(trained(config, folder, 2, 1)), final(whole))
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_numbers_of_processes(mixed_world, tmp_path):
    """Completions that were drawn ahead by two processes are learned from by one, and so on."""
    config = config_of(mixed_world, **(FULL | {"rollout__ahead": 1, "train__steps": 9, "train__checkpoint_every": 1}))
    whole, folder, rng = trained(config, tmp_path / "whole", 1, 4), tmp_path / "killed", random.Random(1)
    for count in (2, 1, 4):
        killed(config, folder, count, 4 // count, count - 1, 2, rng)
        with Checkpoints(folder / "checkpoints", keep=9, read_only=True) as kept:
            assert kept.pending(kept.latest())["step"] == kept.latest()
    assert_same_run(trained(config, folder, 2, 2), whole)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(mixed_world, tmp_path):
    config = config_of(
        mixed_world, **(FULL | {"rollout__ahead": 1, "train__steps": 300, "train__checkpoint_every": 300})
    )
    folder = tmp_path / "stopped"
    with Processes(write_config(tmp_path / "run_config.py", config), folder, 2, 2) as run:
        run.wait_for_steps(folder, 2, timeout=600)
        run.running[1].send_signal(signal.SIGTERM)
        assert run.wait(120) == [0, 0], run.text()
        done = len(read_steps(folder / "metrics.jsonl"))
        assert f"stopped after step {done} of 300" in run.text()
    assert final(folder)[0] == done


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_ends_all(mixed_world, tmp_path):
    config = config_of(mixed_world, reward="fails_on_the_second", rollout__prompts=2)
    with Processes(write_config(tmp_path / "run_config.py", config), tmp_path / "failed", 2) as run:
        assert run.wait(300) == [1, 1], run.text()
        assert "process 1 of 2 cannot go on; its own output says why" in run.output[0].read_text()
        assert "fails_on_the_second" in run.output[1].read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rollout__prompts=3), "rollout.prompts = 3 cannot be divided evenly over 2 hosts"),
        (
            dict(mesh__fsdp=2, mesh__data=1, rollout__tensor=2),
            "rollout.tensor = 2 spans several hosts, which have 1",
        ),
        (dict(mesh__tensor=2, mesh__data=1), "mesh.tensor = 2 spans several hosts, which have 1"),
    ],
)
def test_what_cannot_be_divided_is_said_at_once(mixed_world, tmp_path, changes, message):
    config = config_of(mixed_world, **{"learner__completions_per_row": 4, **changes})
    if changes.get("mesh__data"):
        config.mesh.data = 1
    with Processes(write_config(tmp_path / "run_config.py", config), tmp_path / "refused", 2) as run:
        assert run.wait(120) == [1, 1] and message in run.text(), run.text()
