"""The held-out loss: what it is, that it changes nothing else, and what it is used for."""

from __future__ import annotations

import json
import math
import os
import signal

import jax
import numpy as np
import pytest

from mllm4d_jax.files.jsonl import read_steps
from mllm4d_jax.report.columns import summary
from mllm4d_jax.rows.batch import collate
from mllm4d_jax.run.build import load_trainable, open_held_out
from mllm4d_jax.run.checkpoint import Checkpoints, ResumeError
from mllm4d_jax.run.preflight import PreflightError, check
from mllm4d_jax.sft import held_out as held_out_module
from mllm4d_jax.sft import task as sft
from mllm4d_jax.sft.held_out import HeldOutError
from mllm4d_jax.sft.setup import set_up
from mllm4d_jax.sft.step import Trainer


@pytest.fixture
def config(make_config, tiny_world, tmp_path):
    """Six steps of eight questions; held out are five, one of them unusable, of two clips."""
    config = make_config(*tiny_world)
    records = json.loads(tiny_world[1].read_text())
    kept = [records[i] for i in (0, 1, 2, 5)]
    bad = {"video": "videos/absent.mp4", "conversations": records[0]["conversations"]}
    path = tmp_path / "held_out.json"
    path.write_text(json.dumps([*kept[:2], bad, *kept[2:]]))
    config.data.eval_path, config.train.eval_every, config.train.checkpoint_every = str(path), 2, 3
    return config


def trained(config, workdir):
    """Runs to the end; the parameters and the rows."""
    workdir.mkdir()
    assert sft.run(config, str(workdir)) == 0
    with Checkpoints(workdir / "checkpoints", 1) as checkpoints:
        setup = set_up(config, workdir, checkpoints)
    return jax.tree.map(np.array, setup.trainer.trainable), read_steps(workdir / "metrics.jsonl")


def separate_loss(config, setup):
    """Mean over the supervised tokens of the usable records, each a sample of its own; no row, no mesh, no dropout."""
    encoder, source = setup.begun.encoder, open_held_out(config, config.data.eval_path, "")
    model, total, count = load_trainable(config, setup.trainer.step.mesh), 0.0, 0
    for i in (0, 1, 3, 4):
        example = encoder.encode(source[i])
        ids = (encoder.config.image_token_id, encoder.config.video_token_id)
        logits = model.logits(model(collate([example], setup.loader.shape.geometry, visual_token_ids=ids)))
        nll = -jax.nn.log_softmax(np.asarray(logits)[0].astype(np.float64))
        targets = np.flatnonzero(example.supervised)
        total += float(sum(nll[t - 1, example.tokens[t]] for t in targets))
        count += len(targets)
    return total / count


def test_it_is_the_mean_over_the_tokens_of_the_usable_records(config, tmp_path, monkeypatch):
    """Two questions about a clip share its prefix here, and training drops out. Only the first time decodes."""
    config.data.questions_per_video, config.data.rows, config.lora.dropout = 2, 8, 0.3
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        setup = set_up(config, tmp_path, checkpoints)
    with setup.begun.encoder:
        measured = setup.held_out(setup.trainer.trainable)
        np.testing.assert_allclose(measured, separate_loss(config, setup), rtol=1e-5)
        monkeypatch.setattr(setup.begun.encoder, "encode_group", None)  # would be called
        assert setup.held_out(setup.trainer.trainable) == measured
        moved = jax.tree.map(lambda x: x + 0.05, setup.trainer.trainable)
        assert abs(setup.held_out(moved) - measured) > 1e-3


def test_measuring_changes_nothing_and_picks_the_best(config, tmp_path):
    config.train.keep_best, config.train.keep_checkpoints = 1, 1
    ours, rows = trained(config, tmp_path / "measured")
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(losses) == [2, 3, 4, 6] and losses[6] != losses[3] and all(np.isfinite(x) for x in losses.values())
    assert summary(rows)["eval_loss"] == losses[6] and "eval_loss" not in summary(rows[:1])
    with Checkpoints(tmp_path / "measured/checkpoints", 1, 1) as checkpoints:
        assert checkpoints._manager.best_step() == min((3, 6), key=losses.get)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads((tmp_path / "held_out.json").read_text())[:2]))
    with Checkpoints(tmp_path / "measured/checkpoints", 1, 1) as checkpoints:
        config.data.eval_path = str(other)  # the losses of the checkpoints would no longer compare
        with pytest.raises(ResumeError, match="data.eval_path: the content is not the same"):
            set_up(config, tmp_path / "measured", checkpoints)
    config.data.eval_path = ""
    theirs, plain = trained(config, tmp_path / "plain")
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("last", "measured"), [(1, []), (3, [2])])
def test_a_stop_saves_without_measuring(config, tmp_path, monkeypatch, last, measured):
    """Before the first measurement, and in a step that has one: what is not saved by then is lost with a kill."""
    config.train.keep_best, config.train.keep_checkpoints = 1, 3
    advance, place, batches = Trainer.advance, held_out_module.place_rows, []

    def and_signal(self, step, data):
        row = advance(self, step, data)
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(held_out_module, "place_rows", lambda *args: batches.append(1) or place(*args))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", and_signal)
        assert sft.run(config, str(tmp_path / "w")) == 0
    rows = read_steps(tmp_path / "w/metrics.jsonl")
    assert [row["step"] for row in rows if "eval_loss" in row] == measured and rows[-1]["step"] == last
    assert len(batches) == len(measured)
    with Checkpoints(tmp_path / "w/checkpoints", 3, 1) as checkpoints:
        assert checkpoints.latest() == last and checkpoints._manager.metrics(last)["loss"] == math.inf
    assert sft.run(config, str(tmp_path / "w")) == 0
    losses = {row["step"]: row["eval_loss"] for row in read_steps(tmp_path / "w/metrics.jsonl") if "eval_loss" in row}
    with Checkpoints(tmp_path / "w/checkpoints", 3, 1) as checkpoints:
        assert checkpoints._manager.best_step() in losses and checkpoints._manager.metrics(6)["loss"] == losses[6]


def test_all_processes_stop_measuring_with_the_first_that_is_asked_to(config, tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        setup = set_up(config, tmp_path, checkpoints)
    told = []
    monkeypatch.setattr(
        held_out_module.multihost, "gather", lambda row: told.append(row) or np.array([row, [*row[:-1], 1]])
    )
    with setup.begun.encoder:
        assert setup.held_out(setup.trainer.trainable) is None
    assert len(told) == 1 and told[0][-1] is False


def test_what_cannot_be_used(config, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"video": "absent.mp4", "conversations": [{"from": "human", "value": "<video>?"}]}]))
    config.data.eval_path = str(bad)
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        setup = set_up(config, tmp_path, checkpoints)
    with setup.begun.encoder, pytest.raises(HeldOutError, match="not one usable record"):
        setup.held_out(setup.trainer.trainable)
    config.data.eval_path = str(tmp_path / "none.json")
    with pytest.raises(PreflightError, match="data.eval_path = .*none.json is not a file"):
        check(config)
