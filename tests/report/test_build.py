"""Whole pages: every kind of workdir, hostile texts, size, sampling, and the task as a user runs it."""

from __future__ import annotations

import base64
import json
import re
import warnings

import numpy as np
import pytest

import run as cli
from data_prep.sources.frames import write_video
from mllm4d_jax.report.browser import BrowserOptions, spread
from mllm4d_jax.report.build import choose_completions, choose_predictions, write_report
from mllm4d_jax.report.reading import CompletionPlace, PredictionPlace, ReportError
from tests.eval.question_fixtures import prediction
from tests.report.reading import assert_nothing_external, read
from tests.report.workdirs import NASTY, write_eval, write_grpo, write_lines, write_sft

FAST = BrowserOptions(frames=0)


def page(workdir, other=None, options=FAST):
    path = write_report(workdir, workdir / "out.html", other, options)
    html = path.read_text(encoding="utf-8")
    assert_nothing_external(html)
    return read(html)


def test_figures_near_the_end_of_the_range_of_floats(tmp_path):
    """Neither their sum nor their distance is a float."""
    huge = {"reward": 1e308, "reward_std/total": 1e308, "step_s": 1e308, "grad_norm": 1e308, "examples": 1.7e308}
    write_lines(tmp_path / "metrics.jsonl", [huge | {"step": s, "loss": (-1) ** s * 1.7e308} for s in range(1, 80)])
    far = {"camera_center": [[1.7e308, 0, 0], [-1.7e308, 0, 1]], "object_center": [[1, 2, 3], [2, 2, 3]]}
    row = {"step": 1, "branch": 0, "completion": "x", "rewards": {"a": 1e308}, "total": 1e308, "advantage": -1.7e308}
    row |= {"solution": {"answer": "A"} | far, "camera": far["camera_center"], "object": [[1.7e308] * 3, [1, 1, 1]]}
    write_lines(tmp_path / "completions.jsonl", [row | {"key": f"k{n}"} for n in range(2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = page(tmp_path)
    assert len(root.all("article")) == 2 and "nan" not in "".join(p.attributes["d"] for p in root.all("path"))
    assert not re.search(r"\d{40}", root.text)


BIG = "<word> " * 700_000


@pytest.mark.parametrize("field", ["id", "benchmark", "split", "category", "subtask", "question", "response", "answer"])
def test_no_text_of_a_prediction_makes_the_page_long(tmp_path, field):
    row = prediction(category="c", subtask="s").to_row() | {field: BIG}
    write_lines(tmp_path / "predictions.jsonl", [row, row | {"id": "other", "choices": {"A": BIG, "B": BIG}}])
    assert write_report(tmp_path, options=FAST).stat().st_size < 500_000


def test_no_name_and_no_number_of_names_makes_the_page_long(tmp_path):
    row = {"step": 1, "branch": 0, "key": "k", "completion": BIG, "rewards": {BIG: 1.0}, "question": BIG, "answer": BIG}
    write_lines(tmp_path / "completions.jsonl", [row | {"subtask": BIG, "solution": {"answer": BIG}}])
    columns = {f"reward/{n}": 1.0 for n in range(5_000)} | {BIG: 1.0}
    write_lines(tmp_path / "metrics.jsonl", [{"step": n, "loss": 1.0, **columns} for n in (1, 2)])
    bad = [{"key": BIG, "reason": f"{n}" * 100, "message": BIG} for n in range(2_000)]
    write_lines(
        tmp_path / "quarantine.jsonl",
        [row if n < 2 else row | {"key": "k", "message": "m"} for n, row in enumerate(bad)],
    )
    assert write_report(tmp_path, options=FAST).stat().st_size < 2_000_000


def sections(root) -> list[str]:
    return [e.attributes["id"] for e in root.all("section")]


def test_the_page_of_a_fine_tuning_run(tmp_path):
    root = page(write_sft(tmp_path, steps=60))
    assert sections(root) == ["curves", "figures", "quarantine", "files", "config"]
    assert root.all("h1")[0].text == f"{tmp_path.name} (sft)"
    keys = [e.text for e in root.all("section")[-1].all("code")]
    assert keys[keys.index("optim.lr") + 1] == "2e-05"
    reasons = [e.text for e in root.all("section")[2].all("td")]
    assert reasons[:4] == ["missing_file", "1", "too_long", "1"]


def test_the_page_of_a_grpo_run(tmp_path):
    root = page(write_grpo(tmp_path, steps=60, groups=3, branches=4), options=BrowserOptions(frames=3))
    assert sections(root) == ["curves", "completions", "figures", "files", "config"]
    cards = root.all("article")
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(cards) == len(rows) == 12
    for card, row in zip(cards, rows, strict=True):
        assert card.all("h3")[0].text == f"step {row['step']}, {row['key']}, branch {row['branch']}"
        assert card.all("div", "said")[0].text == row["completion"]
        assert len(card.all("img")) == 3
        right = row["answer"] == row["solution"]["answer"]
        outcome = "unparsed" if row["answer"] is None else "correct" if right else "wrong"
        assert card.all("span", "mark")[0].text == outcome == json.loads(card.attributes["data-facets"])["outcome"]
        assert json.loads(card.attributes["data-keys"])["step"] == row["step"]
        assert len(card.all("figure", "chart")) == 1


def test_the_page_of_an_evaluation(tmp_path):
    root = page(write_eval(tmp_path, clips=2))
    assert sections(root) == ["evaluation", "predictions", "files", "config"]
    assert "There is no results.json" in root.text and len(root.all("article")) == 8
    (tmp_path / "results.json").write_text('{"groups": [{"table": "all", "name": "all", "n": 8, "accuracy": 0.125}]}')
    root = page(tmp_path)
    assert "As results.json has it." in root.text
    assert ("accuracy", "12.5%") in [
        (e.all("dt")[0].text, e.all("dd")[0].text) for e in root.all("dl", "tiles")[0].children
    ]


def test_two_runs_side_by_side(tmp_path):
    first, second = (write_grpo(tmp_path / n, 60, 1, 1, seed) for seed, n in enumerate(("one", "two")))
    root = page(first, second)
    assert sections(root) == ["runs", "curves", "figures", "config"]
    assert root.all("h1")[0].text == "one and two"
    heads = [e.text for e in root.all("section")[2].all("th")]
    assert heads[:4] == ["quantity", "one", "two", "difference"]


def test_answers_of_two_evaluations_side_by_side(tmp_path):
    first, second = (write_eval(tmp_path / n, seed, clips=3) for seed, n in enumerate(("one", "two")))
    root = page(first, second)
    assert sections(root) == ["runs", "evaluation", "outcomes", "differences", "config"]
    for card in root.all("article"):
        outcomes = [e.text for e in card.all("span", "mark")]
        assert len(outcomes) == 2 and outcomes.count("correct") == 1
        assert [e.text for e in card.all("h4")] == ["one", "two"]
        facet = json.loads(card.attributes["data-facets"])["outcome"]
        assert facet == f"one: {outcomes[0]}; two: {outcomes[1]}"


def test_hostile_texts_stay_texts(tmp_path):
    write_sft(tmp_path, steps=2)
    field = {name: NASTY for name in ("key", "question", "completion", "finish", "answer", "branch", "subtask")}
    row = field | {"step": 1, "media": [NASTY], "rewards": {NASTY: 1.0}, "solution": {"answer": NASTY}}
    write_lines(tmp_path / "completions.jsonl", [row])
    write_lines(tmp_path / "evals.jsonl", [{"step": 1, NASTY: 1.0, f"reward/{NASTY}": 2.0}])
    options = {"A": NASTY, NASTY: NASTY}
    fields = ("id", "benchmark", "split", "category", "response", "letter", "rule", "media")
    write_lines(tmp_path / "predictions.jsonl", [{n: NASTY for n in fields} | {"choices": options, "truth": [NASTY]}])
    (tmp_path / "results.json").write_text(json.dumps({NASTY: [{NASTY: NASTY}], "a": NASTY}))
    root = page(tmp_path, options=BrowserOptions(frames=2))
    assert len(root.all("script")) == 1 and len(root.all("style")) == 1
    shown = NASTY.replace("\ud800", "\ufffd")
    assert shown in root.all("article")[0].all("p", "question")[0].text
    assert len([e for e in root.all() if e.text == shown]) > 10


def test_200_long_completions_with_noisy_clips_fit_in_ten_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    clips = []
    for n in range(4):
        clips.append(str(tmp_path / f"{n}.mp4"))
        noise = rng.integers(0, 256, (8, 240, 320, 3), np.uint8)
        write_video(tmp_path / f"{n}.mp4", noise, np.arange(8) / 8, "mpeg4")
    write_grpo(tmp_path, steps=500, groups=1, branches=1)
    row = json.loads((tmp_path / "completions.jsonl").read_text().splitlines()[0])
    long = "<thinking>" + "\"'<&>" * 13_000 + "</thinking><answer>A</answer>" + "é" * 500
    rows = [row | {"step": n, "branch": n % 8, "media": [clips[n % 4]], "completion": long, "question": "?'\"" * 30_000}
            for n in range(200)]  # fmt: skip
    write_lines(tmp_path / "completions.jsonl", rows)
    path = write_report(tmp_path)
    html = path.read_bytes()
    assert path == tmp_path / "report.html" and 3e6 < len(html) <= 10e6
    pictures = re.findall(rb'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(pictures) == 800 and all(base64.b64decode(p)[:2] == b"\xff\xd8" for p in pictures)


def test_too_many_completions_are_sampled_in_whole_groups_over_all_steps():
    places = [CompletionPlace((None, 0), float(s), f"k{k}") for s in range(100) for k in range(4) for _ in range(12)]
    chosen = choose_completions(places, 200)
    groups = {(one.step, one.key) for one in chosen}
    assert len(chosen) == 16 * 12 and len(groups) == 16
    steps = sorted(one.step for one in chosen)
    assert steps[0] == 0 and steps[-1] == 99 and np.diff(steps).max() < 10
    assert choose_completions(places[:200], 200) == places[:200]
    assert len(choose_completions(places[:12], 5)) == 5


def test_doubtful_predictions_are_shown_first():
    outcomes = ["correct", "wrong", "correct", "unparsed"] * 25
    places = [PredictionPlace((None, n), str(n), "", "", "", "", o, n % 20 == 0) for n, o in enumerate(outcomes)]
    doubtful = [one for one in places if one.outcome != "correct" or one.conflict]
    assert len(doubtful) == 55 and choose_predictions(places, 55) == doubtful
    some = choose_predictions(places, 20)
    assert len(some) == 20 and set(some) <= set(doubtful) and places[99] in some and places[0] in some
    most = choose_predictions(places, 70)
    assert len(most) == 70 and set(doubtful) <= set(most) and most == sorted(most, key=lambda one: one.place[1])
    assert choose_predictions(places, 200) == places


def test_the_page_says_that_it_shows_a_part(tmp_path):
    write_grpo(tmp_path, steps=20, groups=5, branches=4)
    root = page(tmp_path, options=BrowserOptions(answers=8, frames=0))
    assert len(root.all("article")) == 8
    assert "8 of 20, chosen whole groups of a prompt, evenly over the steps" in root.text


def test_places_are_spread_evenly():
    assert spread(5, 9) == [0, 1, 2, 3, 4] and spread(101, 3) == [0, 50, 100] and spread(9, 1) == [0]


def test_the_same_workdir_gives_the_same_bytes(tmp_path):
    write_grpo(tmp_path, steps=20, groups=2, branches=2)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    write_sft(tmp_path, steps=3)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "taken" / "x.html", tmp_path / "folder"):
        with pytest.raises(ReportError, match="cannot be written"):
            write_report(tmp_path, out)
    assert not list(tmp_path.glob("**/*.partial"))


def call(*flags: str) -> int:
    return cli.main(["run.py", "--config=configs/report.py", *flags])


def test_the_task_writes_the_page_and_says_where(tmp_path, capsys):
    first, second = write_sft(tmp_path / "a", 5), write_sft(tmp_path / "b", 5, seed=1)
    assert call(f"--config.run={first}") == 0
    assert str(first / "report.html") in capsys.readouterr().out and (first / "report.html").is_file()
    assert call(f"--config.run={first}", f"--config.other={second}", f"--workdir={tmp_path / 'c'}") == 0
    assert "a and b" in (tmp_path / "c" / "report.html").read_text()
    assert call(f"--config.run={first}", f"--config.out={tmp_path / 'd.html'}", "--config.frames=0") == 0
    assert (tmp_path / "d.html").is_file()


@pytest.mark.parametrize("flags", [(), ("--config.run=nowhere",), ("--config.run={empty}",)])
def test_the_task_names_what_is_wrong(tmp_path, capsys, flags):
    assert call(*(flag.format(empty=tmp_path) for flag in flags)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
