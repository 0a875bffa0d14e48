"""Numeric answers: what is read, and what it is worth."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm4d_jax.qa.numbers import extract_number, mean_relative_accuracy


@pytest.mark.parametrize(
    ("response", "number", "rule"),
    [
        ("3", 3, "number"),
        ("**2.5**", 2.5, "number"),
        ("1,200.", 1200, "number"),
        ("Seven", 7, "number"),
        ("-3", -3, "number"),
        ("<thinking>The answer is 9.</thinking><answer>4</answer>", 4, "number"),
        ("<think>8 or 9?</think>\n8", 8, "number"),
        ("The room is 4 by 5, so the answer is: 20 square meters. 4 x 5 is 20.", 20, "answer_is"),
        ("The answer is 4. No, the answer is 5.", 5, "answer_is"),
        ("The answer is unclear, I count 5", 5, "answer_is"),
        ("about 2.5 m", 2.5, "mention"),
        ("2.5m", 2.5, "mention"),
        ("25 m^2", 25, "mention"),
        ("25 m2", 25, "mention"),
        ("There are three chairs. Yes, 3.", 3, "mention"),
        ("1.5e2 cm", 150, "mention"),
        ("2-3 m", None, "unparsed"),
        ("between 10 and 12", None, "unparsed"),
        ("one of the two", None, "unparsed"),
        ("2,5", None, "unparsed"),
        ("1.2.3", None, "unparsed"),
        ("1e400", None, "unparsed"),
        ("nan", None, "unparsed"),
        ("\u0663", None, "unparsed"),
        ("A4", None, "unparsed"),
        ("", None, "unparsed"),
    ],
)
def test_what_is_read(response, number, rule):
    assert extract_number(response) == (number, rule)


@given(st.text(st.sampled_from("0123456789.,-+e answer is:\n^m\u22123"), max_size=60) | st.text(max_size=60))
def test_any_text_is_accepted(text):
    number, rule = extract_number(text)
    assert (number is None) == (rule == "unparsed")


def by_the_paper(given: Fraction, truth: Fraction) -> Fraction:
    """The published rule in exact arithmetic, with <= as in the published program."""
    thresholds = [Fraction(50 + 5 * n, 100) for n in range(10)]
    return Fraction(sum(abs(given - truth) / truth <= 1 - t for t in thresholds), 10)


@pytest.mark.parametrize(
    ("given", "truth", "worth"),
    [(4, 4, 1.0), (3, 4, 0.6), (2, 4, 0.1), (1, 4, 0.0), (6, 4, 0.1), (6.1, 4, 0.0), (0, 4, 0.0), (-4, 4, 0.0)],
)
def test_hand_cases(given, truth, worth):
    assert mean_relative_accuracy(given, truth) == pytest.approx(worth, abs=1e-12)


@given(st.integers(-10_000, 10_000), st.integers(1, 10_000))
def test_mean_relative_accuracy_is_the_published_one(given, truth):
    given, truth = Fraction(given, 100), Fraction(truth, 100)
    missed = abs(given - truth) / truth
    if any(abs(missed - Fraction(5 * n, 100)) < Fraction(1, 10**9) for n in range(11)):
        return  # on a threshold, where float64 decides as in the published program: test_thresholds
    assert abs(mean_relative_accuracy(float(given), float(truth)) - by_the_paper(given, truth)) <= 1e-9


@pytest.mark.parametrize(("given", "worth"), [(95.0, 1.0), (90.0, 0.9), (55.0, 0.1), (50.0, 0.1)])
def test_thresholds(given, worth):
    """What the published program, which compares |p - t| / t with 1 - linspace(.5, .95, 10), makes of exact fractions:
    of 45 % off it makes 0.1, for 1 - 0.55 is a little below 0.45 in float64."""
    assert mean_relative_accuracy(given, 100.0) == pytest.approx(worth, abs=1e-12)
