"""The figures of a run, against counts made by hand."""

from __future__ import annotations

import json

import pytest

from mllm4d_jax.eval.scoring import ScoringError, comparison, figures, grouped, results, score
from mllm4d_jax.eval.statistics import Bootstrap
from tests.eval.question_fixtures import prediction

FEW = Bootstrap(200, 1)


def answered(responses, **changes):
    """One question per response, two per video."""
    made = []
    for n, response in enumerate(responses):
        made.append(prediction(f"q{n}", response, video=f"v{n // 2}.mp4", **changes))
    return made


def test_a_groups_figures():
    group = [
        *answered(["A", "B", "", "A. right", "it depends", "left"]),
        prediction("long", "The car", finish="length", video="v9.mp4"),
        prediction("twins", "D", truth=("C", "D"), video="v10.mp4"),
    ]
    found = figures(score(group), FEW)
    assert (found["n"], found["clusters"], found["correct"]) == (8, 5, 4)
    assert found["accuracy"] == 0.5 and 0 <= found["low"] < 0.5 < found["high"] <= 1
    assert (found["unparsed"], found["blank"], found["conflicts"], found["truncated"]) == (3, 1, 1, 1)
    assert found["chance"] == pytest.approx((7 * 0.25 + 0.5) / 8)
    assert found["best_letter"] == 7 / 8  # always A


def test_extractors_differ_on_more_than_letters():
    found = results(answered(["A", "A.", "left", "", "B"]), bootstrap=FEW)
    strict, official = found["extractors"]
    assert (strict["extractor"], strict["correct"], strict["unparsed"]) == ("strict", 3, 1)
    assert (official["extractor"], official["correct"], official["unparsed"]) == ("official", 1, 3)
    assert (strict["correct_with_blanks"], official["correct_with_blanks"]) == (4, 2)
    assert strict["differ"] == 2 and strict["differ_ids"] == ["q1", "q2"]
    assert found["groups"][0]["correct"] == 3
    found = results(answered(["A", "A.", "left", "", "B"]), extractor="official", bootstrap=FEW)
    assert (found["extractor"], found["groups"][0]["correct"], found["rules"]) == (
        "official",
        1,
        {"exact": 2, "unparsed": 3},
    )
    with pytest.raises(ValueError, match="strict, official"):
        results(answered(["A"]), extractor="judge")


def test_rows_of_the_tables():
    made = [
        *answered(["A", "B"], split="real", category="ego", subtask="text"),
        prediction("s0", split="synthetic", category="directional"),
    ]
    names = [(table, name, len(group)) for table, name, group in grouped(score(made))]
    assert names == [
        ("all", "all", 3),
        ("split", "real", 2),
        ("split", "synthetic", 1),
        ("category", "real: ego", 2),
        ("category", "synthetic: directional", 1),
        ("subtask", "real: text", 2),
    ]
    assert [name for _, name, _ in grouped(score(made[:2]))] == ["all"], "rows that repeat the whole are left out"
    two = [prediction("a", subtask="x"), prediction("b", subtask="y")]
    assert [name for _, name, _ in grouped(score(two))] == ["all", "x", "y"]


def test_the_mean_over_subtasks_is_that_of_the_benchmark():
    made = [
        *answered(["A"] * 6, benchmark="mllm4d", subtask="x"),
        *(prediction(f"y{n}", "B", benchmark="mllm4d", subtask="y", video=f"w{n}") for n in range(2)),
    ]
    found = results(made, bootstrap=FEW)
    assert found["groups"][0]["accuracy"] == 0.75
    assert (found["macro"]["subtasks"], found["macro"]["accuracy"]) == (2, 0.5)
    assert results(answered(["A"]), bootstrap=FEW)["macro"] is None


def test_letters_and_rules_are_counted():
    found = results([*answered(["A", "B", "B.", "?"]), prediction("x", truth=("C",))], bootstrap=FEW)
    assert [(row["letter"], row["right"], row["given"]) for row in found["letters"]] == [
        ("A", 4, 2),
        ("B", 0, 2),
        ("C", 1, 0),
        ("D", 0, 0),
    ]
    assert found["rules"] == {"letter": 4, "unparsed": 1}


def test_controls_stand_beside_on_the_questions_that_both_have():
    blind = [prediction(f"q{n}", "A" if n else "B", control="blind", config="other") for n in range(3)]
    shuffled = [prediction("q0", "A", control="shuffled"), prediction("elsewhere", "B", control="shuffled")]
    found = results(answered(["A", "A", "A", "A"]), controls=[blind, shuffled], bootstrap=FEW)
    first, second = found["groups"][0]["controls"]
    assert (first["control"], first["n"], first["accuracy"]) == ("blind", 3, pytest.approx(2 / 3))
    assert (second["control"], second["n"], second["accuracy"]) == ("shuffled", 1, 1.0)
    for wrong in (answered(["A"]), [*blind, *shuffled], []):
        with pytest.raises(ScoringError, match="a control must be one run"):
            results(answered(["A"]), controls=[wrong], bootstrap=FEW)
    with pytest.raises(ScoringError, match="'q0' is not the same in both runs"):
        other = prediction("q0", control="blind", question="Something else?")
        results(answered(["A"]), controls=[[other]], bootstrap=FEW)


def test_a_comparison():
    first = [prediction(f"q{n}", "A" if n < 10 else "B", video=f"v{n}", config="old") for n in range(40)]
    second = [prediction(f"q{n}", "A" if n >= 4 else "B", video=f"v{n}") for n in range(2, 42)]
    found = results(second, compare=first, bootstrap=FEW)["comparison"]
    assert (found["only_in_first"], found["only_in_second"], found["configs"]) == (2, 2, ["old"])
    (row,) = found["rows"]
    assert (row["n"], row["first"], row["second"]) == (38, 8 / 38, 36 / 38)
    assert row["difference"] == pytest.approx(28 / 38) and 0 < row["low"] < row["difference"] < row["high"] <= 1
    assert (row["only_first"], row["only_second"]) == (2, 30) and row["mcnemar_p"] < 1e-6
    assert 0 < row["detectable"] < row["difference"]
    back = comparison(second, first, "strict", FEW)["rows"][0]
    assert back["difference"] == -row["difference"] and back["mcnemar_p"] == row["mcnemar_p"]


def test_what_cannot_be_compared():
    with pytest.raises(ScoringError, match="no question in common"):
        results(answered(["A"]), compare=[prediction("other")], bootstrap=FEW)
    with pytest.raises(ScoringError, match="not the same in both runs"):
        results(answered(["A"]), compare=[prediction("q0", truth=("B",))], bootstrap=FEW)
    with pytest.raises(ScoringError, match="no predictions"):
        results([])


def test_results_are_json_without_nan():
    one_video = results([prediction("q0")], compare=[prediction("q0")], bootstrap=FEW)
    again = json.loads(json.dumps(one_video, allow_nan=False))
    assert again["groups"][0]["low"] is None and again["comparison"]["rows"][0]["detectable"] is None
    assert again == one_video
