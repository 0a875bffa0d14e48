"""How benchmarks' own programs read answers: cases worked out by hand from those programs."""

from __future__ import annotations

import pytest

from mllm4d_jax.qa.answers import EXTRACTORS
from mllm4d_jax.qa.judging import read_answer, worth
from mllm4d_jax.qa.published_rules import PUBLISHED
from tests.eval.question_fixtures import item

NUMBER = {"choices": {}, "truth": (), "answer": "4", "true_number": 4.0}


@pytest.mark.parametrize(
    ("benchmark", "response", "letter"),
    [
        ("vsi", "A", "A"),
        ("vsi", "b. right", "B"),
        ("vsi", "(A)", None),
        ("vsi", "Answer: A", None),
        ("vsi", "A\nbecause", None),
        ("sti", "The door (b) is near. Answer: C", "B"),
        ("sti", "Answer = d", "D"),
        ("sti", "B", "B"),
        ("sti", "it is D", "D"),
        ("sti", "A. left", None),
        ("sti", "", None),
        ("dsr", "The answer is B.", "B"),
        ("dsr", "A car turns: C", "A"),
        ("dsr", "Do it: C", "D"),
        ("dsr", "none", None),
        ("mmsi_video", "\\boxed{C}", "C"),
        ("mmsi_video", "The answer is B, since", "B"),
        ("mmsi_video", "<answer>A</answer>", "A"),
        ("mmsi_video", "A. left", "A"),
        ("mmsi_video", "left", None),
        ("mmsi_video", "no answer is B", None),
    ],
)
def test_letters(benchmark, response, letter):
    found = read_answer(item(benchmark=benchmark), response, "official")
    assert (found.letter, found.rule) == (letter, "unparsed" if letter is None else "official")


@pytest.mark.parametrize(
    ("response", "official", "strict"),
    [
        ("4", 4, 4),
        ("4.", 4, 4),
        ("4 chairs", 4, 4),
        ("four", None, 4),
        ("I count 4", None, 4),
        ("4 or 5", 4, None),
        ("nan", None, None),
        ("inf", None, None),
        ("1e3 m", 1000, 1000),
    ],
)
def test_numbers(response, official, strict):
    asked = item(benchmark="vsi", **NUMBER)
    for extractor, number in (("official", official), ("strict", strict)):
        found = read_answer(asked, response, extractor)
        assert found.number == number and found.letter is None
        assert worth(asked, found) == (1.0 if number == 4 else 0.0)


def test_strict_rules_are_the_same_for_every_benchmark():
    for benchmark in ("jsonl", *PUBLISHED):
        assert read_answer(item(benchmark=benchmark), "The answer is (B).").letter == "B"
    assert read_answer(item(), "A").letter == read_answer(item(), "A", "official").letter == "A"
    assert read_answer(item(), "A.", "official").letter is None
    with pytest.raises(ValueError, match=", ".join(EXTRACTORS)):
        read_answer(item(benchmark="vsi"), "A", "judge")
