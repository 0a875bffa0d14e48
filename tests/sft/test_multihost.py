"""Several real processes on one machine give the run of a single one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal

import jax
import numpy as np
import pytest

from mllm4d_jax.files.jsonl import read_steps
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.mesh import rows_divide
from mllm4d_jax.run.build import build
from mllm4d_jax.run.checkpoint import Checkpoints, Progress
from mllm4d_jax.run.watchdog import Watchdog
from mllm4d_jax.sft.feed import StepFeed
from mllm4d_jax.sft.setup import make_trainer, set_up
from tests.processes import Processes, write_config

SAME = ("step", "position", "examples", "clips", "tokens", "visual", "supervised", "quarantined", "padding")


@pytest.fixture
def config(make_config, mixed_world):
    """Rates that do not depend on the number of steps, which is not known where a signal ends the run."""
    config = make_config(*mixed_world)
    config.optim.lr, config.optim.warmup_ratio, config.optim.schedule = 1e-3, 0.0, "constant"
    config.train.steps, config.train.checkpoint_every, config.train.log_every = 5000, 5000, 1
    config.data.prefix_buckets, config.data.branch_buckets = (512,), (160,)  # few shapes: each is compiled per process
    return config


def one_process(config, workdir, steps, progress=None, saved=None):
    """`steps` steps on one device in this process, optionally from a checkpoint: (rows, parameters)."""
    workdir.mkdir()
    with Checkpoints(saved or workdir / "checkpoints", 1) as checkpoints:
        setup, parts = set_up(config, workdir, checkpoints), build(config, devices=jax.devices()[:1])
        begun = dataclasses.replace(setup.begun, parts=parts, progress=progress or Progress())
        trainer = make_trainer(begun)
    first = 1 + (progress.step if progress else 0)
    feed = StepFeed(setup.loader, config.train.accumulation, setup.flops, False, Watchdog(0))
    with begun.encoder, setup.loader.stream:
        rows = [trainer.advance(first + n, feed.next(last=False)) for n in range(steps)][1:] + [trainer.finish()]
    return rows, jax.tree.map(np.array, trainer.trainable)


def assert_same_curve(ours, theirs, rtol=1e-5):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert [a[k] for k in SAME] == [b[k] for k in SAME]
        for name, factor in (("loss", 1), ("grad_norm", 10)):  # null, without a usable record, is NaN
            np.testing.assert_allclose(*(np.array(row[name], float) for row in (a, b)), rtol=factor * rtol)


def stop_one(config, tmp_path, count, steps, victim):
    """A run over `count` processes of which one gets SIGTERM: the rows up to where all of them stopped."""
    workdir = tmp_path / "shared"
    with Processes(write_config(tmp_path / "run_config.py", config), workdir, count) as run:
        run.wait_for_steps(workdir, steps)
        run.running[victim].send_signal(signal.SIGTERM)
        assert run.wait() == [0] * count, run.text()
        assert f"stopped after step {read_steps(workdir / 'metrics.jsonl')[-1]['step']} of" in run.text()
    return workdir, read_steps(workdir / "metrics.jsonl")


@pytest.mark.slow
def test_two_processes_train_like_one_stop_together_and_one_goes_on(config, tmp_path):
    """Each has one clip a step, or none where its record is unusable; two records in ten are."""
    config.train.batch_size = 2
    workdir, rows = stop_one(config, tmp_path, count=2, steps=10, victim=1)
    done = len(rows)
    empty = [row for row in rows if row["examples"] < 2]
    assert empty and rows[-1]["quarantined"] == sum(2 - row["examples"] for row in rows)
    want, _ = one_process(config, tmp_path / "one", done + 3)
    assert_same_curve(rows, want[:done])
    named = [json.loads(line) for file in workdir.glob("quarantine*.jsonl") for line in file.read_text().splitlines()]
    assert {entry["key"] for entry in named} == {"mixed.json#2", "mixed.json#7"}
    # The same run goes on in a single process.
    with Checkpoints(workdir / "checkpoints", 1) as checkpoints:
        meta = checkpoints.meta(checkpoints.latest())
    progress = Progress(meta.step, meta.position, meta.rejected)
    assert progress == Progress(done, rows[-1]["position"], rows[-1]["quarantined"])
    after, _ = one_process(config, tmp_path / "on", 3, progress, workdir / "checkpoints")
    assert_same_curve(after, want[done:])


@pytest.mark.slow
def test_four_processes_with_micro_batches_and_groups(config, tmp_path):
    """Four processes, two micro-batches, two questions about a clip, workers; then the other half on eight devices."""
    config.data.questions_per_video, config.train.batch_size, config.train.accumulation = 2, 16, 2
    config.data.workers = 1
    workdir, rows = stop_one(config, tmp_path, count=4, steps=4, victim=2)
    want, _ = one_process(config, tmp_path / "one", len(rows) + 2)
    assert_same_curve(rows, want[: len(rows)])
    with Processes(write_config(tmp_path / "run_config.py", config), workdir, 2, devices=2) as run:
        run.wait_for_steps(workdir, len(want))
        run.running[0].send_signal(signal.SIGTERM)
        assert run.wait() == [0, 0], run.text()
    assert_same_curve(read_steps(workdir / "metrics.jsonl")[: len(want)], want)


@pytest.mark.slow
def test_the_held_out_loss_is_that_of_one_process(config, tmp_path):
    """Nine records, two to a batch: in the last one a process has none, in others one that cannot be used."""
    records = json.loads(pathlib.Path(config.data.path).read_text())
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps(records[:9]))
    config.data.eval_path, config.train.batch_size = str(held_out), 2
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = 3, 2, 3
    found = []
    for count in (1, 2):
        workdir = tmp_path / f"of-{count}"
        with Processes(write_config(tmp_path / "run_config.py", config), workdir, count, devices=2 // count) as run:
            assert run.wait(300) == [0] * count, run.text()
        rows = read_steps(workdir / "metrics.jsonl")
        found.append([(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row])
    assert [step for step, _ in found[0]] == [step for step, _ in found[1]] == [2, 3]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert found[0][0][1] != found[0][1][1]


@pytest.mark.slow
def test_what_ends_one_process_ends_all(config, tmp_path):
    """One process finds too many unusable records; the other says that it was not it."""
    config.train.batch_size, config.data.max_quarantine_rate = 2, 0.001
    with Processes(write_config(tmp_path / "run_config.py", config), tmp_path / "shared", 2) as run:
        assert run.wait() == [1, 1], run.text()
        text = run.text()
    assert text.count("are unusable, more than data.max_quarantine_rate") == 1
    assert text.count("cannot go on; its own output says why") == 1


def test_alone_every_agreement_is_immediate():
    assert multihost.gather([1, -2]).tolist() == [[1, -2]] and multihost.share(7) == 7 and multihost.is_primary()
    assert multihost.primary_first(lambda: 5) == 5
    with pytest.raises(OverflowError, match="32 bits"):
        multihost.gather([2**31])


class Device:
    def __init__(self, number, process):
        self.id, self.process_index, self.platform = number, process, "cpu"


@pytest.mark.parametrize(
    ("tensor", "divides"),
    [(1, True), (2, True), (4, False)],
)
def test_rows_divide_as_long_as_tensor_stays_inside_a_process(tensor, divides):
    """Two devices per process, numbered crosswise."""
    devices = [Device(i, process) for i, process in enumerate([0, 1, 2, 3, 0, 1, 2, 3])]

    class Mesh:
        shape = {"data": 8 // tensor, "fsdp": 1, "tensor": tensor}
        devices_sorted = sorted(devices, key=lambda d: d.process_index)

    Mesh.devices = np.array(Mesh.devices_sorted, object).reshape(8 // tensor, 1, tensor)
    assert rows_divide(Mesh) is divides
