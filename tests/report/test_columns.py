"""What several steps become: one function for progress bar, TensorBoard and pages."""

from __future__ import annotations

import math

import pytest

from mllm4d_jax.report.columns import line, over, quantities, summary, tenths, title, written
from tests.run.step_rows import row


def test_summary_averages_and_rates():
    out = summary([row(1, loss=1.0, step_s=1.0, examples=2), row(2, loss=3.0, step_s=3.0, tokens=700)])
    assert out["loss"] == 2.0 and out["qa_per_s"] == 6 / 4 and out["tokens_per_s"] == 200.0
    assert out["lr"] == 5e-4 and out["position"] == 8 and "step" not in out
    assert out["tokens_per_s_device"] == 100.0 and out["visual_share"] == 80 / 800 and out["data_wait"] == 0.2 / 4
    assert "mfu" not in out and "memory_gib" not in out and "tokens" not in out


def test_rates_are_weighed_by_time():
    out = summary([row(1, step_s=9.0), row(2, mfu=0.5, step_s=3.0), row(3, mfu=0.1, step_s=1.0, memory_gib=7.5)])
    assert out["mfu"] == pytest.approx((0.5 * 3 + 0.1) / 4) and out["memory_gib"] == 7.5
    rows = [{"step": 1, "rollouts_per_s": 8.0, "step_s": 1.0}, {"step": 2, "rollouts_per_s": 1.0, "step_s": 8.0}]
    assert summary(rows)["rollouts_per_s"] == pytest.approx(16 / 9)  # 16 rollouts in 9 seconds


def test_what_goes_up_or_is_measured_now_and_then_is_the_newest():
    rows = [{"step": n, "compiles": n, "eval_loss": 1 / n} if n < 3 else {"step": n, "compiles": n} for n in (1, 2, 3)]
    assert summary(rows) == {"compiles": 3.0, "eval_loss": 0.5}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, None, "x", True, 10**400])
def test_what_is_no_finite_number_counts_nowhere(bad):
    rows = [row(1, loss=1.0), row(2, loss=bad, step_s=bad, tokens=bad), row(3, loss=3.0)]
    assert over(rows, "loss") == summary(rows)["loss"] == 2.0
    assert summary(rows)["qa_per_s"] == 12 / 1.0 and summary(rows)["step_s"] == 0.5
    assert math.isnan(over([row(1, loss=bad)], "loss")) and "loss" not in summary([row(1, loss=bad)])


def test_a_run_has_ten_parts_of_one_size_but_the_last():
    assert [len(part) for part in tenths([row(n) for n in range(23)])] == [3] * 7 + [2]
    assert [len(part) for part in tenths([row(n) for n in range(4)])] == [1] * 4 and tenths([]) == []


def test_a_huge_value_is_written_short():
    assert written({"loss": 1e308, "step": -1.7e308}, "loss") == "1e+308"
    assert line({"reward": 1e300, "lr": 1e-5}, ("reward", "lr")) == "reward 1e+300, lr 1.00e-05"


def test_values_are_written_as_people_read_them():
    values = {"loss": 1.25, "lr": 1e-3, "mfu": 0.41, "reward/accuracy": 0.5, "gap_max": 0.000123456}
    said = line(values, ("loss", "qa_per_s", "lr", "mfu", "reward/accuracy", "gap_max"))
    assert said == "loss 1.2500, lr 1.00e-03, MFU 41%, accuracy 0.500, gap max 0.0001235"
    assert title("data_wait") == "waiting for data" and written({}, "loss") == "–"
    assert quantities([{"step": 1, "position": 2, "x": None}, {"devices": 1, "y": 2, "loss": 1}]) == ["y", "loss"]
