"""benchmarks/gpu.py in miniature: its parts run, their rows are tables, and the two sides are given the same work."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu, gpu_ours, gpu_work
from benchmarks.grpo_work import Handed, Numbers, Sample
from configs.reading import ROOT
from mllm4d_jax.models.flops import real_work, row_pairs
from mllm4d_jax.rows.rows import Group


def rows_printed(capsys) -> list[dict]:
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix(gpu.ROW)) for line in lines if line.startswith(gpu.ROW)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    gpu_work.write_settings(path, "tiny")
    return path


def test_a_part_runs_and_its_rows_are_kept(tmp_path):
    out = tmp_path / "found" / "gpu.md"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--parts=card", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [row["part"] for row in rows] == ["card"] * 4 and rows[0]["device"] == "cpu"
    assert all(row["milliseconds"] > 0 for row in rows[1:3]) and "| copy |" in out.read_text()


def test_a_part_that_fails_is_said_and_the_others_go_on(tmp_path, capsys):
    table = gpu.Table(None)
    parts = [gpu.Part("sft", ("-c", "raise SystemExit('no room')"), 1, 60), gpu.Part("decode", ("-c", ROWS), 1, 60)]
    arguments = gpu.arguments(["--tiny"])
    gpu.Runner(arguments, tmp_path, table).run(parts)
    assert [part for part, _ in table.rows] == ["sft", "decode", "decode"]
    assert "exit code 1: no room" in table.rows[0][1]["error"] and table.rows[1][1]["case"] == "1x1"


ROWS = f"""print('{gpu.ROW}{{"case": "1x1", "side": "ours", "tokens_per_second": 6.0}}')"""


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    table = gpu.Table(None)
    gpu.Runner(gpu.arguments(["--tiny"]), tmp_path, table).run([gpu.Part("sft", ("-c", child), 1, 0.5)])
    assert "ended after 0 s" in table.rows[0][1]["error"] and table.rows[0][1]["process_s"] < 30


def test_what_the_budget_has_no_time_for_is_left_out(tmp_path):
    table = gpu.Table(None)
    arguments = gpu.arguments(["--budget=5"])
    gpu.Runner(arguments, tmp_path, table).run([gpu.Part("sparse", ("-c", ROWS), 30, 60)])
    assert len(table.rows) == 1 and "left out" in table.rows[0][1]["note"]


def test_sides_are_compared():
    table = gpu.Table(None)
    for part, side, figures in (
        ("sft", "ours", dict(case="a", questions=20, qa_per_second=60.0)),
        ("sft_more", "ours", dict(case="b", questions=20, qa_per_second=80.0)),
        ("sft", "ours", dict(case="c", questions=1, error="no room")),
        ("theirs", "theirs", dict(case="d", qa_per_second=8.0)),
        ("decode", "ours", dict(case="2x12", tokens_per_second=1500.0)),
        ("decode", "ours", dict(case="16x12", tokens_per_second=9000.0)),
        ("theirs", "theirs", dict(case="2x12", tokens_per_second=250.0)),
        ("grpo", "ours", dict(case="step", decode_s=2.0, step_s=4.0)),
        ("grpo", "theirs", dict(case="step", decode_s=12.0, step_s=20.0)),
    ):
        table.add(part, figures | dict(side=side))
    table.compare()
    found = {row["case"]: row["times_as_fast"] for part, row in table.rows if part == "ratios"}
    assert found == {
        "training, N = 20, QA/s": 10,
        "decoding 2x12, tokens/s": 6,
        "GRPO step, decode, seconds": 6,
        "GRPO step, step, seconds": 5,
    }


def test_questions_are_those_of_the_table(folder):
    """At full size a row is 1,024 tokens and N branches of 96 with 24 targets, about a clip of 32 frames."""
    scale = gpu_work.Scale()
    parts = gpu_ours.parts_of("sft", folder, scale, remat="full", rows=2, questions=3)
    clips = [gpu_work.make_questions(folder, scale, clip, 3) for clip in range(2)]
    batch = parts.shape.collate([[Group(tuple(clip), scale.prefix)] for clip in clips])
    layout = batch.inputs.layout
    assert (layout.prefix, layout.slots, layout.length) == (1024, 3, 96)
    assert (batch.loss_weight > 0).sum(1).tolist() == [3 * 24] * 2
    work = real_work(batch.inputs, 0)
    assert work.tokens == 2 * layout.size and work.pairs == 2 * row_pairs(layout)
    assert work.patches == 2 * 16 * 14 * 14 and (batch.inputs.vision_index[0] >= 0).sum() == 16 * 49
    assert not np.array_equal(clips[0][0].tokens, clips[1][0].tokens)


def test_training_and_decoding_run(folder, capsys):
    gpu_ours.sft(gpu_work.TINY, folder, "1x2:never/1x2:none/1x1:full")
    refused, trained = rows_printed(capsys)
    assert trained["questions"] == 2 and 0 < trained["seconds"] and 0 < trained["loss"] < 20
    assert "unknown remat policy" in refused["error"]
    gpu_ours.decode(gpu_work.TINY, folder, "1x2")
    (decoded,) = rows_printed(capsys)
    assert decoded["steps"] == gpu_work.TINY.tokens - 1 and decoded["tokens_per_second"] > 0


def test_what_theirs_is_given_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    sample = Sample(("p.jsonl#1", "p.jsonl#0"), rng.integers(0, 9, (4, 3)), rng.normal(size=(4, 3)), rng.normal(size=4))
    looks = [
        (
            {"q_proj/lora_a": rng.normal(size=(2, 3, 1))},
            Numbers(rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), n, 2.5),
        )
        for n in (0.5, 1.5)
    ]
    Handed(sample, tuple(looks), (("p.jsonl#0", "p.jsonl#1"),)).save(tmp_path / "handed.npz")
    found = Handed.load(tmp_path / "handed.npz")
    assert found.rounds == (("p.jsonl#0", "p.jsonl#1"),) and found.sample.keys == sample.keys
    for one, other in zip(found.sample[1:], sample[1:], strict=True):
        np.testing.assert_array_equal(one, other)
    for (adapter, numbers), (wanted, expected) in zip(found.looks, looks, strict=True):
        np.testing.assert_array_equal(adapter["q_proj/lora_a"], wanted["q_proj/lora_a"])
        np.testing.assert_array_equal(numbers.policy, expected.policy)
        assert numbers[2:] == expected[2:]
