"""What is said of a run in a few lines and tables, on its page and on the terminal, from the same numbers."""

from __future__ import annotations

import json
import math

import pytest

import run as cli
from mllm4d_jax.report import summary
from mllm4d_jax.report.build import close_run
from mllm4d_jax.report.reading import read_run
from tests.report.reading import read
from tests.report.workdirs import grpo_rows, write_grpo, write_lines, write_sft
from tests.run.step_rows import row


@pytest.fixture
def sft(tmp_path):
    rows = [row(s, step_s=9.0 if s < 4 else 0.5) for s in range(1, 24)]
    rows[4]["eval_loss"], rows[9]["eval_loss"], rows[22]["eval_loss"] = 0.9, 0.4, 0.5
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "facts.json").write_text(json.dumps({"devices": "8 x TPU v5e", "records": "24 in <b>"}))
    return tmp_path


def rows_of(root, caption):
    (table,) = [table for table in root.all("table") if table.all("caption")[0].text == caption]
    return [[cell.text for cell in one.all("td")] for one in table.all("tbody")[0].all("tr")]


def test_a_run_in_a_few_lines(sft):
    found = summary.findings(read_run(sft))
    first = (4 + 2 + 4 / 3) / 3
    assert found["loss"] == f"{first:.4f} -> {(4 / 22 + 4 / 23) / 2:.4f} (means of the first 3 and the last 2 steps)"
    assert found["held-out loss"] == "0.9000 after step 5, lowest 0.4000 after step 10, 0.5000 after step 23"
    assert found["speed after the first tenth"] == (
        "s/step 0.5, QA/s 8.00, tokens/s/device 100, padding 25%, waiting for data 20%"
    )
    assert found["time in steps"] == "37 s, 6% of it waiting for data"
    assert found["compiled since the last start"] == "compilations 1, retraces 0" and found["records skipped"] == "0"


def test_the_page_says_what_the_terminal_says_and_more(sft):
    said = close_run(sft).splitlines()
    assert said[-1] == f"report: {sft / 'report.html'}"
    root = read((sft / "report.html").read_text())
    facts = [["devices", "8 x TPU v5e"], ["records", "24 in <b>"]]
    assert rows_of(root, "The run") == facts + [line.split(": ", 1) for line in said[:-1]]
    steps = rows_of(root, "Steps in ten parts")
    assert [one[0] for one in steps] == ["1-3", "4-6", "7-9", "10-12", "13-15", "16-18", "19-21", "22-23"]
    assert steps[0] == ["1-3", "2.4444", "0.500", "3.33e-04", "9", "0.44", "6", "25%", "1%"]
    quantities = {one[0]: one[1:] for one in rows_of(root, "Quantities of the training steps")}
    assert quantities["tokens"] == ["100", "100", "100", "100"] and quantities["lr"][:2] == ["0.0003333", "4.348e-05"]
    assert [one[0] for one in rows_of(root, "Files of the workdir")] == ["metrics.jsonl"]


def test_a_run_of_reinforcement_learning(tmp_path):
    said = close_run(write_grpo(tmp_path, steps=100, groups=1, branches=1))
    assert "held-out reward: 0.550 after step 50, highest 0.800 after step 100, 0.800 after step 100" in said
    assert "rollouts/s 6.00" in said and "loss: " in said and "QA/s" not in said
    root = read((tmp_path / "report.html").read_text())
    assert rows_of(root, "Held-out prompts")[0] == ["50", "64", "0.550", "0.300", "200"]
    (phases,) = rows_of(root, "Phases of a step, mean after the first tenth")
    rows = grpo_rows(100)[10:]
    wanted = [sum(one[f"time/{name}"] for one in rows) / 90 for name in ("data", "vision", "prefill")]
    assert phases[1:4] == [f"{value:.4g}" for value in wanted]
    assert len(rows_of(root, "Steps in ten parts")) == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "x", 10**400])
def test_a_value_that_is_no_number_costs_nothing_else(tmp_path, bad):
    write_lines(tmp_path / "metrics.jsonl", [row(1), row(2, loss=bad, step_s=bad, eval_loss=bad), row(3)])
    write_lines(tmp_path / "evals.jsonl", [{"step": 1, "n": bad, "reward": bad}, {"step": 2, "reward": 0.5}])
    said = close_run(tmp_path)
    assert "loss: 4.0000 -> 1.3333 (means of the first 1 and the last 1 steps)" in said
    assert "held-out reward: 0.500 after step 2, highest 0.500 after step 2, 0.500 after step 2" in said
    assert "held-out loss" not in said


@pytest.mark.parametrize("name", ["metrics.jsonl", None])
def test_a_run_that_left_nothing_to_show_says_so(tmp_path, capsys, name):
    """A finished run whose metrics.jsonl was lost or emptied used to end in an IndexError."""
    if name:
        (tmp_path / name).touch()
    cli.write_page(tmp_path)
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("no report: ") and "metrics.jsonl" in found.err


def test_two_runs_show_what_each_says(tmp_path):
    from mllm4d_jax.report import compare

    runs = {name: read_run(write_sft(tmp_path / name, 20, seed)) for seed, name in enumerate("ab")}
    table = {one[0]: one[1:] for one in rows_of(read(compare.tile_columns(runs)), "Both runs")}
    assert table["loss"] == [summary.findings(run)["loss"] for run in runs.values()] and table["steps"] == ["20", "20"]
