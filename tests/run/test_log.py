"""What a run writes about itself."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from mllm4d_jax.run.log import RunLog, read_metrics, smoothed, summary, write_curve, write_report


def row(step, **changes):
    values = dict(
        step=step,
        loss=4.0 / step,
        accuracy=0.5,
        grad_norm=1.0,
        lr=1e-3 / step,
        step_s=0.5,
        data_wait_s=0.1,
        examples=4,
        clips=1,
        tokens=100,
        visual=40,
        supervised=12,
        padding=0.25,
        mfu=None,
        memory_gib=None,
        devices=2,
        position=4 * step,
        quarantined=0,
        compiles=1,
        retraces=0,
    )
    return values | changes


def test_lines_beyond_the_restored_step_go_away(tmp_path):
    with RunLog(tmp_path, steps=9, start=0, log_every=2) as log:
        for step in range(1, 6):
            log.step(row(step))
        log.step(None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    with RunLog(tmp_path, steps=9, start=3, log_every=2) as log:
        log.step(row(4, loss=0.125))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 0.125
    assert rows[0] == row(1)
    assert list((tmp_path / "tb").iterdir())


def test_summary_averages_and_rates():
    out = summary([row(1, loss=1.0, step_s=1.0, examples=2), row(2, loss=3.0, step_s=3.0, tokens=700)])
    assert out["loss"] == 2.0 and out["qa_per_s"] == 6 / 4 and out["tokens_per_s"] == 200.0
    assert out["lr"] == 5e-4 and out["position"] == 8 and "step" not in out
    assert out["tokens_per_s_device"] == 100.0 and out["visual_share"] == 80 / 800 and out["data_wait"] == 0.2 / 4
    assert "mfu" not in out and "memory_gib" not in out and "tokens" not in out


def test_summary_weighs_utilisation_by_time():
    out = summary([row(1, step_s=9.0), row(2, mfu=0.5, step_s=3.0), row(3, mfu=0.1, step_s=1.0, memory_gib=7.5)])
    assert out["mfu"] == pytest.approx((0.5 * 3 + 0.1) / 4) and out["memory_gib"] == 7.5


def test_smoothing_is_a_trailing_mean():
    values = list(np.random.default_rng(0).normal(size=30))
    want = [np.mean(values[max(0, i - 6) : i + 1]) for i in range(30)]
    np.testing.assert_allclose(smoothed(values, 7), want, atol=1e-12)


@pytest.mark.parametrize("count", [1, 23])
def test_report_and_curve(tmp_path, count):
    rows = [row(s) for s in range(1, count + 1)]
    write_curve(tmp_path / "curve.png", rows, "a run")
    picture = cv2.imread(str(tmp_path / "curve.png"))
    assert picture is not None and picture.shape[1] > 800 and picture.std() > 5
    write_report(tmp_path / "report.md", rows, {"optim.lr": 0.1}, {"devices": "one"})
    text = (tmp_path / "report.md").read_text()
    assert "| optim.lr | `0.1` |" in text and "- devices: one" in text
    if count == 23:
        assert f"loss {(4 + 2 + 4 / 3) / 3:.4f}" in text and "| 22-23 | 0.1779 | 0.500 |" in text
        assert "| 1-3 | 2.4444 | 0.500 | 3.33e-04 | 0.50 | 8.00 | 100 | n/a | 20% | 25% |" in text
