"""Curves of runs: what is drawn, averaged and grouped."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from mllm4d_jax.report import curves
from mllm4d_jax.report.columns import column
from mllm4d_jax.report.reading import read_run
from tests.report.reading import read
from tests.report.workdirs import write_grpo, write_lines, write_sft


@pytest.mark.parametrize("width", [1, 2, 7, 200])
def test_the_running_mean_is_that_of_the_last_values_that_are_numbers(width):
    rng = np.random.default_rng(width)
    values = rng.normal(size=300)
    values[rng.random(300) < 0.3] = math.nan
    values[40] = math.inf
    got = curves.running_mean(values, width)
    for n in range(300):
        window = values[max(0, n + 1 - width) : n + 1]
        window = window[np.isfinite(window)]
        if width == 1:
            assert got[n] == values[n] or math.isnan(values[n])
        else:
            assert got[n] == pytest.approx(window.mean()) if len(window) else math.isnan(got[n])


def test_one_huge_value_does_not_spoil_what_comes_after_it_nor_do_blocks():
    values = np.ones(10_000)
    values[10] = 1e25
    got = curves.running_mean(values, 100)
    assert np.all(got[:10] == 1) and got[50] > 1e20 and np.all(got[110:] == 1)
    assert np.array_equal(curves.running_mean(np.zeros(0), 5), np.zeros(0))


def chart_titles(markup) -> list[str]:
    return [e.all("figcaption")[0].text for e in read(markup).all("figure")]


def test_an_sft_run_has_its_curves_and_nothing_of_what_it_lacks(tmp_path):
    run = read_run(write_sft(tmp_path, steps=120))
    titles = chart_titles(curves.curve_section({"": run}))
    assert titles[:4] == ["Loss", "Token accuracy", "Learning rate", "Gradient norm before clipping"]
    assert "Model FLOPs utilisation" not in titles and "Total reward" not in titles  # mfu is null throughout
    assert titles[-1] == "tokens"  # a quantity without a place of its own
    assert not {"position", "devices", "step"} & set(titles)


def test_a_grpo_run_has_every_reward_with_its_spread_and_the_held_out_values(tmp_path):
    run = read_run(write_grpo(tmp_path, steps=100, groups=1, branches=1))
    root = read(curves.curve_section({"": run}))
    figures = {e.all("figcaption")[0].text: e for e in root.all("figure")}
    rewards = [title for title in figures if "eward" in title]
    assert rewards[0] == "Total reward" and len(rewards) == 8
    assert all(figures[title].all("path", "band") for title in rewards)
    assert not figures["Loss"].all("path", "band")
    total = [e.text for e in figures["Total reward"].all("ul")[0].all("span")]
    assert total == ["reward", "reward, held out"]
    assert [e.text for e in figures["Phases of a step"].all("ul")[0].all("span")] == [
        "data", "decode", "prefill", "score", "update", "vision"]  # fmt: skip
    assert "Other quantities" not in root.text


def test_every_number_of_the_rows_is_drawn_somewhere(tmp_path):
    rows = [{"step": s, "loss": 1.0, "new/thing": s, "reward": 0.5, "text": "x"} for s in (1, 2, 3)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    root = read(curves.curve_section({"": read_run(tmp_path)}))
    assert [e.all("figcaption")[0].text for e in root.all("figure")] == ["Loss", "Total reward", "new/thing"]
    (folded,) = root.all("details")
    assert folded.all("summary")[0].text == "Other quantities (1)" and len(folded.all("figure")) == 1


def test_runs_over_each_other_keep_one_colour_each(tmp_path):
    first = read_run(write_grpo(tmp_path / "a", steps=100, groups=1, branches=1))
    second = read_run(write_sft(tmp_path / "b", steps=80))
    root = read(curves.curve_section({"a": first, "b": second}))
    for figure in root.all("figure"):
        names = {li.text: next(iter(li.classes)) for li in figure.all("li")}
        assert names["a"] == "s0" and names["b"] == "s1", figure.text
        assert names.get("a, held out", "s0") == "s0"
    titles = chart_titles(curves.curve_section({"a": first, "b": second}))
    assert "Phases of a step: decode" in titles and "Clipped tokens: clipped low" in titles


def test_values_that_are_no_numbers_are_gaps(tmp_path):
    losses = [1.0, None, "x", math.nan, 10**400, True, 2.0]
    write_lines(tmp_path / "metrics.jsonl", [{"step": n, "loss": v} for n, v in enumerate(losses)])
    x, y = column(read_run(tmp_path).metrics, "loss")
    assert len(x) == 7 and np.flatnonzero(np.isfinite(y)).tolist() == [0, 6]
    assert chart_titles(curves.curve_section({"": read_run(tmp_path)})) == ["Loss"]


def test_noise_is_averaged_and_evaluations_are_not(tmp_path):
    rows = [
        {"step": n, "loss": n % 2, "lr": 1.0 - n / 200} | ({"eval_loss": n} if n % 20 == 0 else {}) for n in range(200)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    root = read(curves.curve_section({"": read_run(tmp_path)}))
    loss, rate = (root.all("figure")[n] for n in (0, 1))
    assert "the mean of 8 steps" in loss.text and len(loss.all("path", "faint")) == 1
    evaluated = next(e for e in loss.all("path", "s1"))
    assert evaluated.attributes["d"].count("L") == 9 and evaluated.all("title")[0].text == "eval loss: last 180"
    assert not rate.all("path", "faint") and "mean" not in rate.text


def test_the_area_is_one_standard_deviation_either_way(tmp_path):
    rows = [{"step": n, "reward": 0.5, "reward/format": 0.25, "reward_std/total": 0.2, "reward_std/format": 0.1}
            for n in range(10)]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", rows)
    for figure, std in zip(read(curves.curve_section({"": read_run(tmp_path)})).all("figure"), (0.2, 0.1), strict=True):
        area = np.array(re.findall(r"([\d.]+) ([\d.]+)", figure.all("path", "band")[0].attributes["d"]), float)
        marks = [line.number("y1") for line in figure.all("line", "grid")]
        words = [e.text for e in figure.all("text") if e.attributes.get("text-anchor") == "end"]
        texts = [float(word) for word in words if word != "step"]
        unit = (marks[0] - marks[1]) / (texts[1] - texts[0])  # drawing units for 1
        assert np.ptp(area[:, 1]) / unit == pytest.approx(2 * std, rel=0.02)
