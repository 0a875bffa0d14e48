"""Which option a response chose: one case per line, with the rule that must decide."""

from __future__ import annotations

import time

import pytest

from mllm4d_jax.qa.answers import extract_answer, plain_text, same_option, true_letters
from mllm4d_jax.qa.reasoning import with_prompt

MOVES = {"A": "left", "B": "right", "C": "clockwise", "D": "counter-clockwise"}
STATES = {"A": "moving", "B": "not moving", "C": "there is no car", "D": "a car"}
NUMBERS = {"A": "2.5", "B": "12.7", "C": "15.2", "D": "2"}
COUNTS = {"A": 1, "B": 2, "C": 3, "D": 0}
NESTED = {"A": "left", "B": "left and down", "C": "down", "D": "up"}
TWINS = {"A": "not sure", "B": "up", "C": "away from the camera", "D": "Away from the  camera"}

CASES = [
    # a letter
    ("A", MOVES, "A", "letter"),
    (" B \n", MOVES, "B", "letter"),
    ("(C)", MOVES, "C", "letter"),
    ("D.", MOVES, "D", "letter"),
    ("D)", MOVES, "D", "letter"),
    ("D:", MOVES, "D", "letter"),
    ("A: left", MOVES, "A", "letter"),
    ("A. left", MOVES, "A", "letter"),
    ("A) left", MOVES, "A", "letter"),
    ("(A) left", MOVES, "A", "letter"),
    ("(A)left", MOVES, "A", "letter"),
    ("B. It goes that way.", MOVES, "B", "letter"),
    ("B.\nIt goes that way.", MOVES, "B", "letter"),
    ("**B**", MOVES, "B", "letter"),
    ("**B.** right", MOVES, "B", "letter"),
    ("`C`", MOVES, "C", "letter"),
    # what is no letter
    ("a", MOVES, None, "unparsed"),
    ("(b)", MOVES, None, "unparsed"),
    ("E", MOVES, None, "unparsed"),
    ("(E) left", MOVES, "A", "mention"),
    ("a car turning", MOVES, None, "unparsed"),
    ("A car turning", MOVES, None, "unparsed"),
    ("A car turning left", MOVES, "A", "mention"),
    ("A car turning right", MOVES, "B", "mention"),
    ("AB", MOVES, None, "unparsed"),
    ("A B", MOVES, None, "unparsed"),
    ("A or B", MOVES, None, "unparsed"),
    ("Answer", MOVES, None, "unparsed"),
    ("D.C. is where it was filmed", MOVES, None, "unparsed"),
    ("", MOVES, None, "unparsed"),
    (" \n\t", MOVES, None, "unparsed"),
    ("A", {"B": "x", "C": "y"}, None, "unparsed"),
    # an option's text
    ("left", MOVES, "A", "text"),
    ("Left.", MOVES, "A", "text"),
    ('"RIGHT"!', MOVES, "B", "text"),
    ("Counter clockwise", MOVES, "D", "text"),
    ("counter-clockwise", MOVES, "D", "text"),
    ("clockwise", MOVES, "C", "text"),
    ("not moving", STATES, "B", "text"),
    ("A car.", STATES, "D", "text"),
    ("There is no car!", STATES, "C", "text"),
    ("2.5", NUMBERS, "A", "text"),
    ("2", NUMBERS, "D", "text"),
    ("2.", NUMBERS, "D", "text"),
    ("25", NUMBERS, None, "unparsed"),
    ("-2", NUMBERS, None, "unparsed"),
    ("3", COUNTS, "C", "text"),
    ("0", COUNTS, "D", "text"),
    ("0.", COUNTS, "D", "text"),
    ("10", COUNTS, None, "unparsed"),
    ("away from the camera", TWINS, "C", "text"),
    # a stated answer
    ("The answer is B", MOVES, "B", "answer_is"),
    ("the answer is B.", MOVES, "B", "answer_is"),
    ("The correct answer is: (C), I think", MOVES, "C", "answer_is"),
    ("ANSWER: D", MOVES, "D", "answer_is"),
    ("Final answer : **A**", MOVES, "A", "answer_is"),
    ("The answer is option B", MOVES, "B", "answer_is"),
    ("The answer is A.", MOVES, "A", "answer_is"),
    ("The answer is A because of the road", MOVES, "A", "answer_is"),
    ("The answer is B because of the road", MOVES, "B", "answer_is"),
    ("First the answer is A, but then the answer is B", MOVES, "B", "answer_is"),
    ("The answer is C.\nThe answer is unclear to some.", MOVES, "C", "answer_is"),
    ("The answer: clockwise", MOVES, "C", "answer_is"),
    ("The answer is counter-clockwise", MOVES, "D", "answer_is"),
    ("It is not left. The answer is right.", MOVES, "B", "answer_is"),
    ("The answer is left.\nright is wrong", MOVES, "A", "answer_is"),
    ("The answer is A car", STATES, "D", "answer_is"),
    ("The answer is not moving", STATES, "B", "answer_is"),
    ("Answer: 12.7 metres", NUMBERS, "B", "answer_is"),
    ("The answer is 3", COUNTS, "C", "answer_is"),
    # what states none
    ("The answer is Cat", MOVES, None, "unparsed"),
    ("The answer is C-shaped", MOVES, None, "unparsed"),
    ("The answer is A dog", MOVES, None, "unparsed"),
    ("The answer is E", MOVES, None, "unparsed"),
    ("The answer is not left", MOVES, None, "unparsed"),
    ("The answers B", MOVES, None, "unparsed"),
    ("unanswer is B", MOVES, None, "unparsed"),
    ("The answer is left or right", MOVES, None, "unparsed"),
    # the only option that is mentioned
    ("The car moves left.", MOVES, "A", "mention"),
    ("It turns counter-clockwise on the spot", MOVES, "D", "mention"),
    ("left, left and again left", MOVES, "A", "mention"),
    ("not left but right", MOVES, "B", "mention"),
    ("It goes left and down.", NESTED, "B", "mention"),
    ("The answer is left and down", NESTED, "B", "answer_is"),
    ("leftmost", MOVES, None, "unparsed"),
    ("It goes left, then right", MOVES, None, "unparsed"),
    ("it is clockwise, not counter-clockwise", MOVES, "C", "mention"),
    ("The bus is not moving here", STATES, "B", "mention"),
    ("I see there is no car at all", STATES, "C", "mention"),
    ("about 12.7 m", NUMBERS, "B", "mention"),
    ("between 2.5 and 12.7", NUMBERS, None, "unparsed"),
    ("It went away from the camera", TWINS, "C", "mention"),
    # which part counts
    ("<answer>B</answer>", MOVES, "B", "letter"),
    ("<thinking>A</thinking><answer> B </answer>", MOVES, "B", "letter"),
    ("<answer>A</answer> no, <answer>B</answer>", MOVES, "B", "letter"),
    ("<answer>left</answer> B", MOVES, "A", "text"),
    ("<answer>B</answer><answer>A", MOVES, "B", "letter"),
    ("<answer></answer> A", MOVES, None, "unparsed"),
    ("<thinking>left</thinking> right", MOVES, "B", "text"),
    ("<thinking>The answer is A</thinking> C", MOVES, "C", "letter"),
    ("the prompt opened the thought</thinking>\nB", MOVES, "B", "letter"),
    ("<thinking>It moves left", MOVES, "A", "mention"),
    ("<answer>A", MOVES, None, "unparsed"),
    # a thinking model's thought, which the prompt may have opened
    ("A? no, the answer is A ... no </think>\n\nThe answer is B", MOVES, "B", "answer_is"),
    ("<think>The answer is A</think>\n\nB", MOVES, "B", "letter"),
    ("<think>\n<answer>A</answer>\n</think>\n\nIt goes right.", MOVES, "B", "mention"),
    ("left</think><thinking>left</thinking><answer>B</answer>", MOVES, "B", "letter"),
    ("<think>A</think>B</think>C", MOVES, "C", "letter"),
    ("<think>The answer is A", MOVES, None, "unparsed"),
    ("<think>\nA", MOVES, None, "unparsed"),
    ("<think>A</think>", MOVES, None, "unparsed"),
    ("<answer>A</answer></think>", MOVES, None, "unparsed"),
    ("B <think> or A", MOVES, "B", "letter"),
    # the options repeated
    ("A. left\nB. right\nC. clockwise\nD. counter-clockwise\n\nAnswer: B", MOVES, "B", "answer_is"),
    ("A. left\nB. right\nAnswer: B", MOVES, "B", "answer_is"),
    ("A. left\nB. right\nC. clockwise\nD. counter-clockwise\nB. right", MOVES, "B", "letter"),
    ("Options:\n(A) LEFT\n(B) right\n(C) clockwise\n(D) counter-clockwise\n\nB", MOVES, "B", "letter"),
    ("A: left, B: right, C: clockwise, D: counter-clockwise. The answer is (B)", MOVES, "B", "answer_is"),
    ("**A. left**\n**B. right**\n\nIt turns right.", MOVES, "B", "mention"),
    ("- A. left\n- B. right\nAnswer: right", MOVES, "B", "answer_is"),
    ("B\n\nA. left\nB. right", MOVES, "B", "letter"),
    ("A. 2.5\nB. 12.7\nC. 15.2\nD. 2\n\n12.7", NUMBERS, "B", "text"),
    ("<answer>A. left\nB. right\nB</answer>", MOVES, "B", "letter"),
    ("A. left: no.\nB. right: yes.\nThe answer is B", MOVES, "B", "answer_is"),
    ("A. left\nB. right", MOVES, None, "unparsed"),
    ("A. left: no.\nB. right: yes.", MOVES, None, "unparsed"),
    ("A. left\nIt does.", MOVES, "A", "letter"),
    ("B. right\nA. left is wrong", MOVES, "B", "letter"),
    ("B. right\nC. clockwise is wrong", MOVES, "B", "letter"),
]


def test_there_are_enough_cases():
    assert len(CASES) >= 80


@pytest.mark.parametrize(("response", "choices", "letter", "rule"), CASES)
def test_extraction(response, choices, letter, rule):
    found = extract_answer(response, choices)
    assert (found.letter, found.rule, found.conflict) == (letter, rule, False)


@pytest.mark.parametrize(
    ("response", "choices", "letter", "rule"),
    [
        ("A. right", MOVES, "A", "letter"),
        ("(B): left", MOVES, "B", "letter"),
        ("C: It turns counter-clockwise", MOVES, "C", "letter"),
        ("A. It turned, so the answer is B", MOVES, "A", "letter"),
        ("B\n", {"A": "x", "B": "y"}, "B", "letter"),
        ("The answer is (A) right", MOVES, "A", "answer_is"),
        ("<answer>A: 12.7</answer>", NUMBERS, "A", "letter"),
    ],
)
def test_a_letter_that_contradicts_its_text_counts_and_is_flagged(response, choices, letter, rule):
    found = extract_answer(response, choices)
    assert (found.letter, found.rule, found.conflict) == (letter, rule, response != "B\n")


@pytest.mark.parametrize("response", ["A. left", "A. left, not right", "A. Not right.", "D. away from the camera"])
def test_a_letter_with_its_own_text_is_no_conflict(response):
    assert not extract_answer(response, TWINS if response[0] == "D" else MOVES).conflict


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A", "A"),
        (" A\n", "A"),
        ("<thinking>x</thinking><answer>B</answer>", "B"),
        ("<answer>A</answer><answer>C</answer>", "C"),
        ("A.", None),
        ("(A)", None),
        ("left", None),
        ("The answer is A", None),
        ("", None),
        ("<answer></answer>", None),
        ("E", None),
        ("<answer>A</answer> no</think>\nB", "B"),
        ("<think>A", None),
    ],
)
def test_the_official_extractor_reads_bare_letters_only(response, letter):
    found = extract_answer(response, MOVES, "official")
    assert (found.letter, found.rule) == (letter, "unparsed" if letter is None else "exact")


def test_an_unknown_extractor_is_refused():
    with pytest.raises(ValueError, match="strict, official"):
        extract_answer("A", MOVES, "oficial")


def test_a_thought_that_the_prompt_opened_is_written_down():
    said = with_prompt("<|im_start|>assistant\n<think>\n", "The answer is A")
    assert extract_answer(said, MOVES).letter is None
    assert extract_answer(with_prompt("...<think>\n", "A?</think>B"), MOVES).letter == "B"
    assert with_prompt("what is <think> for?<|im_end|>\n<|im_start|>assistant\n", "A") == "A"


def test_truth_goes_by_the_text():
    assert true_letters(TWINS, "away from the camera") == ("C", "D")
    assert true_letters(COUNTS, 0) == true_letters(COUNTS, "0") == ("D",)
    assert true_letters({"A": "up ", "B": "down"}, " Up") == ("A",)
    assert true_letters(MOVES, "up") == ()
    assert true_letters({"A": "B", "B": "A"}, "A") == ("B",)


def test_plain_text():
    assert plain_text("  The car's  'Front-wheel'!") == "the cars front wheel"
    assert plain_text("-3, \u22123, 4-5; 1.50 m2") == "-3 -3 4 5 1.50 m 2"
    assert plain_text("?!") == "" and same_option("?!") == "?!"
    assert same_option(2) == same_option(" 2") and same_option("Stra\u00dfe") == same_option("STRASSE")


HOSTILE = [
    "answer is ",
    "answer:",
    "answer is A ",
    "answer is left ",
    " ",
    "answer ",
    "\n",
    "left ",
    "left right ",
    "not ",
    "A ",
    "(",
    "<answer>",
    "</answer>",
    "<answer>A</answer>",
    "</thinking>",
    "9",
    "9.",
    "-1",
    "*",
    "counter ",
    "A.\nanswer is ",
    "<think>",
    "</think>",
    "A. left\n",
    "A. left\nB. right\n",
    "A. left ",
    "options: ",
    "A.",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_64_kib_take_less_than_50_ms(piece):
    text = piece * ((1 << 16) // len(piece))
    for whole in (text, f"A. {text}", f"<answer>{text}</answer>"):
        seconds = []
        for _ in range(3):  # the best of three, of this thread alone: others may be at work on this machine
            start = time.thread_time()
            extract_answer(whole, MOVES)
            seconds.append(time.thread_time() - start)
        assert min(seconds) < 0.05, f"{min(seconds):.3f} s for {whole[:40]!r}..."
