"""Whole runs: exact resume, stopping, bad records and bad numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import types

import jax
import numpy as np
import pytest

import run as cli
from configs import sft as sft_config
from mllm4d_jax import __version__
from mllm4d_jax.data.quarantine import QuarantineError
from mllm4d_jax.data.steps import Counts
from mllm4d_jax.files.jsonl import JsonLinesError, read_steps
from mllm4d_jax.rows.rows import RowSizes
from mllm4d_jax.run.build import build
from mllm4d_jax.run.checkpoint import Checkpoints, Progress, ResumeError
from mllm4d_jax.run.clips import CLIPS, ClipsError
from mllm4d_jax.run.loop import StopSignal, TrainingError, TrainingRun
from mllm4d_jax.run.preflight import PreflightError
from mllm4d_jax.run.start import StartError
from mllm4d_jax.run.watchdog import Watchdog
from mllm4d_jax.sft import feed as feed_module
from mllm4d_jax.sft import task as sft
from mllm4d_jax.sft.feed import StepFeed
from mllm4d_jax.sft.setup import make_trainer, set_up
from mllm4d_jax.sft.step import Trainer

STEPS = 6


@pytest.fixture
def config(make_config, mixed_world):
    return make_config(*mixed_world)


class StopAt:
    """Stands in for a signal that arrives during a given step."""

    def __init__(self, step):
        self.run, self.step = None, step

    def __bool__(self):
        return self.run is not None and self.run.progress.step >= self.step


def train(config, workdir, stop_at=STEPS):
    """One part of a run; returns the adapter and optimiser state on the host."""
    workdir.mkdir(exist_ok=True)
    c, stop = config.train, StopAt(stop_at)
    with Checkpoints(workdir / "checkpoints", c.keep_checkpoints, c.keep_best) as checkpoints:
        setup = set_up(config, workdir, checkpoints)
        run = TrainingRun(setup.begun, sft.COLUMNS, stop)
        stop.run = run
        with setup.begun.encoder, run:
            sft.train(setup, run)
        return jax.tree.map(np.array, (setup.trainer.trainable, setup.trainer.opt_state))


@pytest.fixture(scope="module")
def straight(make_config, mixed_world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train(make_config(*mixed_world), workdir)


TIMES = {"step_s", "data_wait_s", "compiles"}


def curve(workdir):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_steps(workdir / "metrics.jsonl")]


def test_resume_is_exact(config, straight, tmp_path):
    """Stopped after step 3, killed after step 5 (checkpoint at 4), finished: the same bits as in one go."""
    train(config, tmp_path / "w", stop_at=3)
    assert [r["step"] for r in curve(tmp_path / "w")] == [1, 2, 3]
    with Checkpoints(tmp_path / "w/checkpoints", 2) as checkpoints:
        assert checkpoints.latest() == 3
    train(config, tmp_path / "w", stop_at=5)
    for part in (tmp_path / "w/checkpoints").iterdir():  # as if the process had died before it could save step 5
        if part.name == "5":
            part.rename(tmp_path / "lost")
    config.train.log_every = 3  # free to change
    resumed = train(config, tmp_path / "w")
    workdir, want = straight
    assert curve(tmp_path / "w") == curve(workdir)
    assert len(curve(workdir)) == STEPS
    assert jax.tree.all(jax.tree.map(np.array_equal, want, resumed))


def test_eight_devices_train_like_one(config, straight, tmp_path):
    """The run above was split over eight devices; the same batches through one device."""
    with Checkpoints(tmp_path / "none", 1) as checkpoints:
        setup = set_up(config, tmp_path, checkpoints)
        trainer = make_trainer(dataclasses.replace(setup.begun, parts=build(config, devices=jax.devices()[:1])))
    feed = StepFeed(setup.loader, 1, setup.flops, False, Watchdog(0))
    with setup.begun.encoder, setup.loader.stream:
        rows = [trainer.advance(n, feed.next(last=False)) for n in range(1, STEPS + 1)][1:] + [trainer.finish()]
    workdir, (lora, _) = straight
    for ours, theirs in zip(rows, curve(workdir), strict=True):
        assert ours["position"] == theirs["position"]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-3)
    # Adam divides by the gradient's own size, so that rounding grows; it stays small beside what was learned.
    start = jax.tree.map(np.array, setup.trainer.trainable)
    for a, b, c in zip(*map(jax.tree.leaves, (lora, trainer.trainable, start)), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a - c)


def test_bad_records_are_named_once_and_the_rest_is_used(straight):
    workdir, _ = straight
    entries = [json.loads(line) for line in (workdir / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((e["key"], e["reason"]) for e in entries) == [
        ("mixed.json#2", "missing_file"),
        ("mixed.json#7", "unknown_role"),
    ]
    last = curve(workdir)[-1]
    # 48 places over epochs of ten records, two of them bad: those places stay empty.
    assert last["position"] == 8 * STEPS and 8 <= last["quarantined"] <= 10
    assert sum(row["examples"] for row in curve(workdir)) == 8 * STEPS - last["quarantined"]
    assert last["retraces"] == 0


def test_a_finished_run_reports_and_can_be_called_again(config, straight, capsys):
    workdir, _ = straight
    first, last = (row["loss"] for row in (curve(workdir)[0], curve(workdir)[-1]))
    for _ in range(2):
        assert sft.run(config, str(workdir)) == 0
        cli.write_page(workdir)
        said = capsys.readouterr().out
        assert f"{STEPS} steps done" in said and f"report: {workdir / 'report.html'}" in said
        assert f"loss: {first:.4f} -> {last:.4f} (means of the first 1 and the last 1 steps)" in said
        page = (workdir / "report.html").read_text()
        assert all(text in page for text in ("trainable parameters", "compilations 1", "Steps in ten parts", "1-1"))
    assert len(curve(workdir)) == STEPS


def test_a_finished_run_that_lost_its_metrics_says_so(config, straight, tmp_path, capsys):
    workdir = tmp_path / "w"
    shutil.copytree(straight[0], workdir)
    for text in ("", None):
        (workdir / "metrics.jsonl").unlink() if text is None else (workdir / "metrics.jsonl").write_text(text)
        assert sft.run(config, str(workdir)) == 0
        cli.write_page(workdir)
        found = capsys.readouterr()
        assert f"{STEPS} steps done" in found.out and "no report: " in found.err and "metrics.jsonl" in found.err


def test_a_damaged_line_of_the_metrics_ends_the_next_start(config, tmp_path):
    """It used to lose every later row, without a word."""
    train(config, tmp_path, stop_at=3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    damaged = "".join([lines[0], "{}}\n", lines[2]])
    path.write_text(damaged)
    with pytest.raises(JsonLinesError, match="metrics.jsonl, line 2: not a JSON object"):
        train(config, tmp_path)
    assert path.read_text() == damaged


def test_another_config_does_not_continue_the_run(make_config, mixed_world, straight):
    config = make_config(*mixed_world)
    written = (straight[0] / "config.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(config.to_dict() | {"version": __version__}))
    config.optim.lr = 1.0
    config.lora.rank = 2
    with pytest.raises(ResumeError, match="lora.rank: was 16, is 2\n  optim.lr: was 0.003, is 1.0"):
        sft.run(config, str(straight[0]))
    config = make_config(*mixed_world)
    config.train.resume = False
    with pytest.raises(ResumeError, match="already holds step 6"):
        sft.run(config, str(straight[0]))
    assert (straight[0] / "config.json").read_text() == written


def test_other_clips_do_not_continue_the_run_and_damage_is_told(config, straight, tmp_path, caplog):
    """Before anything is built; a run whose newest checkpoint is damaged goes on from the one before."""
    workdir = shutil.copytree(straight[0], tmp_path / "w")
    known = json.loads((workdir / CLIPS).read_text())
    (workdir / CLIPS).write_text(json.dumps(dict.fromkeys(known, "5:abc")))
    with pytest.raises(ClipsError, match="2 of the 2 clips looked at are not the files that this run began with"):
        sft.run(config, str(workdir))
    (workdir / CLIPS).write_text(json.dumps(known))
    (workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").write_text("{")
    assert sft.run(config, str(workdir)) == 0
    assert "going on from step 4 instead" in caplog.text
    assert [row["loss"] for row in curve(workdir)] == [row["loss"] for row in curve(straight[0])]


def test_a_signal_saves_and_returns(config, tmp_path, monkeypatch, capsys):
    advance = Trainer.advance

    def and_signal(self, step, data):
        row = advance(self, step, data)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", and_signal)
        assert sft.run(config, str(tmp_path)) == 0
    assert "stopped after step 2 of 6" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert [r["step"] for r in curve(tmp_path)] == [1, 2]
    with Checkpoints(tmp_path / "checkpoints", 2) as checkpoints:
        assert checkpoints.latest() == 2


def bad_records(path, count):
    rows = [{"video": f"{n}.mp4", "conversations": [{"from": "human", "value": "<video>?"}]} for n in range(count)]
    rows[0]["conversations"][0]["from"] = "judge"
    path.write_text(json.dumps(rows))
    return str(path)


def test_a_run_without_a_usable_record_is_an_error(config, tmp_path):
    """It used to end well, with a loss of 0.0 and a checkpoint of nothing learned."""
    config.data.path, config.data.max_quarantine_rate = bad_records(tmp_path / "bad.json", 30), 1.0
    config.train.steps = 2
    with pytest.raises(QuarantineError, match=r"not one usable record in .*bad.json: \d+ missing_file") as caught:
        sft.run(config, str(tmp_path / "w"))
    assert str(tmp_path / "w" / "quarantine.jsonl") in str(caught.value)
    with Checkpoints(tmp_path / "w/checkpoints", 1) as checkpoints:
        assert checkpoints.latest() is None


def test_losses_are_those_of_steps_with_a_record(config, tmp_path):
    begun = types.SimpleNamespace(workdir=tmp_path, config=config, progress=Progress(2))
    rows = [{"step": 1, "loss": 4.0, "examples": 8}, {"step": 2, "loss": None, "examples": 0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = sft.Losses(begun, held_out=False)
    assert losses.value == 4.0 and losses.learned
    losses.note({"step": 3, "loss": 2.0, "examples": 1})
    losses.note({"step": 4, "loss": None, "examples": 0})
    assert losses.value == 3.0
    begun.progress = Progress()
    fresh = sft.Losses(begun, held_out=False)
    assert fresh.value == math.inf and not fresh.learned


class FakeLoader:
    """One host's part of steps, of which nothing but their sizes matters."""

    def __init__(self, barren):
        self.stream = types.SimpleNamespace(barren=barren, nothing_usable=lambda: QuarantineError("not one usable"))
        self.shape = types.SimpleNamespace(sizes=lambda needed: needed)

    def next_step(self, stop):
        return types.SimpleNamespace(needed=RowSizes(1, 1, 1, 0, 0, 1))


@pytest.mark.parametrize(("mine", "theirs", "ends"), [(1, 1, True), (1, 0, False), (0, 1, False), (1, 2, False)])
def test_only_all_processes_together_can_find_no_record(monkeypatch, mine, theirs, ends):
    """0: it has some, 1: none so far, 2: it was asked to stop."""

    def gather(numbers):
        return np.array([numbers, [theirs, *numbers[1:]]])

    monkeypatch.setattr(feed_module.multihost, "gather", gather)
    feed = StepFeed(FakeLoader(barren=bool(mine)), 1, None, False, Watchdog(0))
    if ends:
        with pytest.raises(QuarantineError, match="not one usable"):
            feed._agree(Counts(), last=False)
    else:
        agreed, _ = feed._agree(Counts(), last=False)
        assert agreed.stop is (theirs == 2)


def test_second_interrupt_is_immediate():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_non_finite_loss_stops_naming_step_and_records(config, tmp_path, monkeypatch):
    advance = Trainer.advance

    def poisoned(self, step, data):
        if step == 5:
            bad = [b._replace(loss_weight=b.loss_weight * np.float32("nan")) for b in data.batches]
            data = dataclasses.replace(data, batches=tuple(bad))
        return advance(self, step, data)

    monkeypatch.setattr(Trainer, "advance", poisoned)
    with pytest.raises(TrainingError, match=r"loss of step 5 is not finite.*mixed\.json#\d") as caught:
        sft.run(config, str(tmp_path))
    named = re.findall(r"mixed\.json#(\d)", str(caught.value))
    assert 5 <= len(named) <= 8 and not {"2", "7"} & set(named)  # the unusable ones were not in it
    assert [r["step"] for r in curve(tmp_path)] == [1, 2, 3, 4]
    with Checkpoints(tmp_path / "checkpoints", 2) as checkpoints:
        assert checkpoints.latest() == 4


def test_micro_batches_take_the_same_steps_and_resume(config, straight, tmp_path):
    """Two micro-batches a step, begun with one: the same groups in each step, the same curve but for rounding."""
    train(config, tmp_path / "w", stop_at=2)
    config.train.accumulation = 2
    config.mesh.tensor = 2
    train(config, tmp_path / "w")
    for ours, theirs in zip(curve(tmp_path / "w"), curve(straight[0]), strict=True):
        exact = ("step", "position", "examples", "supervised", "tokens", "quarantined")
        assert [ours[k] for k in exact] == [theirs[k] for k in exact]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


def test_a_run_can_start_from_the_adapter_of_another(config, straight, tmp_path):
    workdir, (adapter, _) = straight
    config.model.adapter = str(workdir)
    with Checkpoints(tmp_path / "new", 1) as checkpoints:
        setup = set_up(config, tmp_path, checkpoints)
    assert setup.begun.progress == Progress()
    assert jax.tree.all(jax.tree.map(np.array_equal, adapter, jax.tree.map(np.array, setup.trainer.trainable)))
    assert not any(np.any(x) for x in jax.tree.leaves(setup.trainer.opt_state))  # moments and counters begin anew
    config.model.step = 4
    with Checkpoints(tmp_path / "older", 1) as checkpoints, Checkpoints(workdir / "checkpoints", 1) as kept:
        older = set_up(config, tmp_path, checkpoints).trainer.trainable
        wanted, _ = kept.restore(4, setup.trainer.trainable, setup.trainer.opt_state)
    assert jax.tree.all(jax.tree.map(np.array_equal, *(jax.tree.map(np.array, tree) for tree in (wanted, older))))
    assert not jax.tree.all(jax.tree.map(np.array_equal, adapter, jax.tree.map(np.array, older)))
    config.model.step = 3
    with pytest.raises(PreflightError, match=r"model.step = 3: .*checkpoints holds the steps 4, 6"):
        sft.run(config, str(tmp_path / "absent"))
    config.model.step = -1
    config.lora.alpha = 1.0
    with pytest.raises(StartError, match=r"trained otherwise: lora.alpha: 32.0 there, 1.0 here"):
        with Checkpoints(tmp_path / "other", 1) as checkpoints:
            set_up(config, tmp_path, checkpoints)


def test_the_best_checkpoints_stay(config, tmp_path, monkeypatch):
    config.train.checkpoint_every, config.train.keep_checkpoints, config.train.keep_best = 1, 1, 1
    config.train.log_every = 1
    losses = iter([3.0, 1.0, 2.0, 1.5, 1.25, 4.0])
    monkeypatch.setattr(sft.Losses, "value", property(lambda self: next(losses)))
    train(config, tmp_path / "w")
    with Checkpoints(tmp_path / "w/checkpoints", 1, 1) as checkpoints:
        assert (checkpoints.latest(), checkpoints._manager.best_step()) == (STEPS, 2)
    kept = sorted(p.name for p in (tmp_path / "w/checkpoints").iterdir() if p.name.isdigit())
    assert kept == ["2", "6"]


def test_chosen_steps_are_traced(config, tmp_path):
    config.train.steps, config.train.trace_steps = 3, (2,)
    train(config, tmp_path / "w")
    traces = list((tmp_path / "w/trace").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


@pytest.mark.slow
def test_the_tiny_config_learns(tmp_path):
    """The run the README begins with, on the test session's eight devices."""
    config = sft_config.get_config("tiny")
    config.train.batch_size = 8
    assert sft.run(config, str(tmp_path)) == 0
    rows = read_steps(tmp_path / "metrics.jsonl")
    assert np.mean([r["loss"] for r in rows[-20:]]) < 0.1 * np.mean([r["loss"] for r in rows[:5]])
    assert rows[-1]["retraces"] == 0
