"""Whole runs: rewards rise, interrupted runs end in the same bits, and what a run writes can be read."""

from __future__ import annotations

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mllm4d_jax.files.jsonl import read_steps
from mllm4d_jax.grpo import task as grpo
from mllm4d_jax.grpo.held_out import HeldOut
from mllm4d_jax.grpo.task import Rounds
from mllm4d_jax.report.build import close_run
from mllm4d_jax.run.checkpoint import Checkpoints
from mllm4d_jax.run.preflight import PreflightError
from tests.grpo import grpo_cases
from tests.grpo.grpo_cases import final, make_config, same_bits
from tests.report.reading import read


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A run takes all devices it finds; these are about one."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)


class Killed(Exception):
    """In place of a signal that ends the process."""


@pytest.mark.parametrize("ahead", [0, 1])
def test_interrupted_runs_end_in_the_same_bits(tiny_world, tmp_path, monkeypatch, ahead):
    """Killed between checkpoints, asked to stop between steps, and not at all; with `ahead` places are filled again."""
    changes = dict(rollout__ahead=ahead, objective__beta=0.05, train__accumulation=2)
    changes |= dict(rollout__prompts_at_once=1, rollout__completions_at_once=3) if ahead else {}
    whole = tmp_path / "whole"
    assert grpo.run(make_config(tiny_world, **changes), str(whole)) == 0
    expected = final(whole)
    learn = grpo.learn

    def killed_at(last):
        def limited(setup, run, drawn):
            if drawn.rollouts.step == last:
                raise Killed
            return learn(setup, run, drawn)

        return limited

    folder = tmp_path / "killed"
    for last in (3, 5):
        monkeypatch.setattr(grpo, "learn", killed_at(last))
        with pytest.raises(Killed):
            grpo.run(make_config(tiny_world, **changes), str(folder))
    monkeypatch.setattr(grpo, "learn", learn)
    assert grpo.run(make_config(tiny_world, **changes), str(folder)) == 0
    same_bits(final(folder), expected)

    def stopping(setup, run, drawn):
        if drawn.rollouts.step == 2:
            run.stop._asked = True
        return learn(setup, run, drawn)

    folder = tmp_path / "stopped"
    monkeypatch.setattr(grpo, "learn", stopping)
    assert grpo.run(make_config(tiny_world, **changes), str(folder)) == 0
    with Checkpoints(folder / "checkpoints", keep=9) as kept:
        assert kept.latest() == 3 and (kept.pending(3) is not None) == bool(ahead)
    monkeypatch.setattr(grpo, "learn", learn)
    assert grpo.run(make_config(tiny_world, **changes), str(folder)) == 0
    same_bits(final(folder), expected)
    for name in ("metrics.jsonl", "completions.jsonl"):
        found, wanted = (read_steps(place / name) for place in (folder, whole))
        assert len(found) == len(wanted) == 6 * (1 if name[0] == "m" else 16)
        for a, b in zip(found, wanted, strict=True):
            timed = {key for key in a if key.startswith("time/") or key.endswith(("_s", "compiles"))}
            assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    rows = read_steps(whole / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, *[ahead] * 5]


def test_a_stop_while_the_next_completions_are_drawn(tiny_world, tmp_path, monkeypatch):
    """The step under way waits for the next start: in the unbroken run they were drawn before its update."""
    changes = dict(rollout__ahead=1, train__checkpoint_every=2)
    assert grpo.run(make_config(tiny_world, **changes), str(tmp_path / "whole")) == 0
    prompts = Rounds._next_prompts

    def stopped(self):
        stop = self._run.stop
        stop._asked = stop._asked or self._run.progress.step == 3
        return prompts(self)

    monkeypatch.setattr(Rounds, "_next_prompts", stopped)
    assert grpo.run(make_config(tiny_world, **changes), str(tmp_path / "stopped")) == 0
    with Checkpoints(tmp_path / "stopped/checkpoints", keep=9) as kept:
        assert kept.latest() == 3 and kept.pending(3)["step"] == 3
    monkeypatch.setattr(Rounds, "_next_prompts", prompts)
    assert grpo.run(make_config(tiny_world, **changes), str(tmp_path / "stopped")) == 0
    same_bits(final(tmp_path / "stopped"), final(tmp_path / "whole"))


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up(tiny_world, tmp_path, monkeypatch):
    """After a step with a checkpoint and after the last one, which has one of its own."""
    evals = dict(eval__path=str(tiny_world[1] / "r1.jsonl"), eval__every=2, eval__limit=2)
    config, evaluate = make_config(tiny_world, train__steps=3, train__checkpoint_every=2, **evals), HeldOut.run
    for last in (2, 3):

        def fails(self, weights, step, *more, last=last):
            if step == last:
                raise Killed
            return evaluate(self, weights, step, *more)

        monkeypatch.setattr(HeldOut, "run", fails)
        with pytest.raises(Killed):
            grpo.run(config, str(tmp_path))
        assert final(tmp_path)[0] == last
    monkeypatch.setattr(HeldOut, "run", evaluate)
    for _ in range(2):  # the second time nothing is missing
        assert grpo.run(config, str(tmp_path)) == 0
        assert [row["step"] for row in read_steps(tmp_path / "evals.jsonl")] == [0, 2, 3]


def test_every_process_cuts_its_own_completions(tmp_path):
    """In a bucket each has a copy of the workdir, of which the first one's cuts did not reach the others' files."""
    names = {"evals.jsonl", "completions.jsonl", "completions.1.jsonl", "completions.2.jsonl"}  # three before, two now
    for host, cut in enumerate((names - {"completions.1.jsonl"}, {"completions.1.jsonl"})):
        folder = tmp_path / str(host)
        folder.mkdir()
        for name in names:
            (folder / name).write_text('{"step": 2}\n{"step": 3}\n{"step": 4, "completi')
        grpo.rewind(folder, 2, host, 2)
        assert {name for name in names if (folder / name).read_text() == '{"step": 2}\n'} == cut
    grpo.rewind(tmp_path / "none", 2, 0, 1)


def test_rewards_rise(tiny_world, tmp_path):
    """Three seeds of it are in test_grpo_campaigns.py."""
    config = make_config(tiny_world, rollout__prompts=4)
    config.train.steps, config.train.checkpoint_every = 70, 1000
    assert grpo.run(config, str(tmp_path)) == 0
    rewards = [row["reward"] for row in read_steps(tmp_path / "metrics.jsonl")]
    assert np.mean(rewards[:3]) < 0.4 and np.mean(rewards[-5:]) > 0.9


def test_equal_rewards_leave_the_policy_alone(tiny_world, tmp_path):
    assert grpo.run(make_config(tiny_world, reward="constant", train__steps=2), str(tmp_path)) == 0
    rows = read_steps(tmp_path / "metrics.jsonl")
    assert all(row["dead_groups"] == 1.0 and row["entropy"] > 0 and row["gap_max"] < 1e-4 for row in rows)
    assert all(row[name] is None for row in rows for name in ("loss", "grad_norm", "lr"))
    before = ocp.StandardCheckpointer().restore(tmp_path / "start" / "0" / "trainable")
    _, after = final(tmp_path)
    for path, x in jax.tree_util.tree_leaves_with_path(before):
        np.testing.assert_array_equal(np.asarray(x), after[f"trainable{jax.tree_util.keystr(path)}"])


def test_what_no_completion_counts_for_is_not_measured(tiny_world, tmp_path):
    """Dynamic sampling finds no group of different rewards: no token counts, and zeros would be no measurements."""
    changes = dict(reward="constant", objective__dynamic_sampling="on", rollout__max_rounds=1, train__steps=1)
    assert grpo.run(make_config(tiny_world, **changes), str(tmp_path)) == 0
    (row,) = read_steps(tmp_path / "metrics.jsonl")
    assert row["dropped"] == row["dead_groups"] == 1.0 and row["reward"] == 0.5
    for name in ("loss", "grad_norm", "lr", "ratio", "entropy", "gap", "gap_kl", "gap_max", "clipped_low"):
        assert row[name] is None, name


def test_dynamic_sampling_fills_a_step(tiny_world, tmp_path):
    """Prompts whose completions are all judged alike are replaced by further ones."""
    config = make_config(tiny_world, reward="only_directions", objective__dynamic_sampling="on", rollout__max_rounds=8)
    config.train.steps = 2
    assert grpo.run(config, str(tmp_path)) == 0
    rows = read_steps(tmp_path / "metrics.jsonl")
    assert all(row["dead_groups"] == 0.0 and row["dropped"] == 0.0 for row in rows)
    assert rows[-1]["position"] > 2 * 2
    asked = {row["question"] for row in read_steps(tmp_path / "completions.jsonl")}
    assert asked and not any("metres" in question for question in asked)


def test_what_a_run_writes(tiny_world, tmp_path):
    """Components, held-out rewards, readable completions; an unusable record is named and passed over."""
    model, folder = tiny_world
    lines = (folder / "r1.jsonl").read_text().splitlines()
    bad = json.loads(lines[0]) | {"solution": [{"answer": "seven"}]}
    mixed = folder / "mixed.jsonl"
    mixed.write_text("\n".join([lines[0], json.dumps(bad), *lines[1:]]) + "\n")
    config = make_config(tiny_world, train__steps=5, eval__path=str(folder / "r1.jsonl"), eval__every=4, eval__limit=3)
    config.data.path, config.data.max_quarantine_rate = str(mixed), 0.5
    config.reward.functions = ("paper::0.5", f"{grpo_cases.__name__}:figures::0.5")
    assert grpo.run(config, str(tmp_path)) == 0
    rows = read_steps(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    names = {
        "reward/accuracy",
        "reward/paper",
        "reward_std/total",
        f"reward/{grpo_cases.__name__}:figures",
        "time/decode",
        "gap",
    }
    assert names <= rows[0].keys() and all(row["gap_max"] < 1e-4 for row in rows)
    evals = read_steps(tmp_path / "evals.jsonl")
    assert [(row["step"], row["n"]) for row in evals] == [(0, 3), (4, 3), (5, 3)]
    completions = read_steps(tmp_path / "completions.jsonl")
    assert len(completions) == 5 * 16
    one = completions[0]
    assert "Frames are counted from 0." in one["question"] and one["media"][0].endswith(".mp4")
    assert one["solution"]["answer"] in "ABCD" and abs(one["total"] - one["rewards"]["total"]) < 1e-9
    groups = {}
    for row in completions:
        groups.setdefault((row["step"], row["key"]), []).append(row["advantage"])
    assert all(abs(sum(values)) < 1e-3 for values in groups.values())
    bad_rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["index"], row["reason"]) for row in bad_rows] == [(1, "bad_solution")]
    said = close_run(tmp_path)
    assert f"held-out reward: {evals[0]['reward']:.3f} after step 0, highest " in said and "rollouts/s" in said
    root = read((tmp_path / "report.html").read_text())
    tables = {table.all("caption")[0].text: table for table in root.all("table")}
    rows = [[cell.text for cell in row.all("td")] for row in tables["Held-out prompts"].all("tbody")[0].all("tr")]
    assert [row[:2] for row in rows] == [["0", "3"], ["4", "3"], ["5", "3"]]
    phases = [cell.text for cell in tables["Phases of a step, mean after the first tenth"].all("th")]
    assert phases == ["seconds", "data", "vision", "prefill", "decode", "score", "update"]
    assert "completions of a step" in tables["The run"].text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mesh__fsdp=2), "would gather all weights"),
        (dict(learner__completions_per_row=3), "cannot be laid out 3 to a row"),
        (dict(train__accumulation=3), "cannot be split into train.accumulation = 3"),
        (dict(rollout__buckets=(4,)), "add a bucket"),
        (dict(objective__preset="grpoo"), "no objective preset 'grpoo'"),
        (dict(reward__functions=("paper",)), "not of the form name::weight"),
        (dict(train__trainable=("lora", "vision/.*")), "vision tower"),
        (dict(train__trainable=("lora", "vision/merger/mlp/.*")), "vision tower"),
        (dict(eval__path="absent.jsonl"), "eval.path"),
        (dict(model__adapter="absent"), "holds no checkpoint"),
    ],
)
def test_what_cannot_work_is_said_at_once(tiny_world, tmp_path, monkeypatch, changes, message):
    if changes.get("mesh__fsdp"):
        devices = jax.local_devices()[:2]
        monkeypatch.setattr(jax, "devices", lambda *_: devices)
    with pytest.raises(PreflightError, match=message.replace("(", r"\(")):
        grpo.run(make_config(tiny_world, **changes), str(tmp_path))
