"""Extraction on arbitrary text: it never raises, and what it returns follows from the text."""

from __future__ import annotations

import string

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mllm4d_jax.qa.answers import EXTRACTORS, RULES, extract_answer, plain_text, true_letters

CHOICES = {"A": "left", "B": "not moving", "C": "moving", "D": 3}
PIECES = [
    "<answer>",
    "</answer>",
    "<thinking>",
    "</thinking>",
    "<think>",
    "</think>",
    "A. left\n",
    "B. not moving",
    "answer is ",
    "Answer: ",
    "(A)",
    "B.",
    "C",
    "left",
    "moving",
    "not ",
    "3",
    "12",
    " ",
    "\n",
    ".",
    "**",
    "\ud800",
    "\x00",
    "\u0661",
    "ß",
]
anything = st.text(st.characters(), max_size=200)  # all of Unicode, lone surrogates too
mixed = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=30).map("".join)
letters = st.sampled_from(string.ascii_uppercase)
options = st.dictionaries(letters, st.text(st.characters(), max_size=12) | st.integers() | st.floats(), max_size=8)


def check(response, choices):
    for extractor in EXTRACTORS:
        found = extract_answer(response, choices, extractor)
        assert found.rule in RULES and type(found.conflict) is bool
        assert (found.letter is None) == (found.rule == "unparsed")
        assert found.letter is None or found.letter in choices
        if found.conflict:
            assert found.rule in ("letter", "answer_is")
    return extract_answer(response, choices)


@settings(max_examples=500, deadline=None)
@given(anything, options)
def test_any_text_and_any_options(response, choices):
    check(response, choices)


@settings(max_examples=800, deadline=None)
@given(mixed)
def test_pieces_in_any_order(response):
    found = check(response, CHOICES)
    if found.rule in ("text", "mention"):  # its option's text is in there
        assert plain_text(CHOICES[found.letter]) in plain_text(response)


@settings(max_examples=300, deadline=None)
@given(anything)
def test_a_closed_answer_decides_alone(before):
    assume("<think>" not in before)  # what follows it is thought as long as it is open
    for said, letter in (("B", "B"), ("left", "A"), ("3", "D"), ("none of these", None)):
        assert extract_answer(f"{before}<answer></answer><answer>{said}</answer>", CHOICES).letter == letter


@settings(max_examples=300, deadline=None)
@given(mixed, mixed)
def test_a_thought_changes_nothing(thought, after):
    said = after.replace("</think>", "")
    for before in (thought, f"<think>{thought}"):
        assert extract_answer(f"{before}</think>{said}", CHOICES) == extract_answer(said, CHOICES)


@settings(max_examples=300, deadline=None)
@given(st.text(string.ascii_letters + " .,:", max_size=30), letters)
def test_a_letter_within_a_word_is_none(word, letter):
    """Lower-case words around a letter cannot make it an answer."""
    text = f"{word.lower()} x{letter}x"
    assert extract_answer(text, {"A": "?", letter: "!"}).letter is None


@settings(max_examples=300, deadline=None)
@given(options)
def test_every_option_reads_back(choices):
    """A response that is an option's text chooses an option with that text (letters and stated answers come first)."""
    for option in choices.values():
        found = extract_answer(str(option), choices)
        if found.rule == "text":
            assert plain_text(choices[found.letter]) == plain_text(str(option).translate({42: None, 96: None}))
        for answer in true_letters(choices, option):
            assert answer in choices
