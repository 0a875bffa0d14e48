"""What is said of a completion that is not read, or not all of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm4d_jax.qa.reasoning import unread

CENTERS = "Camera Center: [0, 0, 0]\nObject Center: null\nCamera Center: [1, 0, 0]\nObject Center: null"
WHOLE = f"<thinking>{CENTERS}</thinking><answer>A</answer>"


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        (WHOLE, []),
        (f"<think>try <answer>B</answer></think>{WHOLE}", []),
        (f"{WHOLE}<think>and", ["a thought (<think>) is never closed: nothing behind its opening counts"]),
        ("A", ["there is no <thinking> block", "there is no <answer> block"]),
        (f"<thinking>{CENTERS}", ["<thinking> is opened and never closed", "there is no <answer> block",
                                  "centres outside the thinking, where they do not count: 4"]),
        (f"{WHOLE}<answer>B</answer>", ["the <answer> blocks differ: the last one counts",
                                        "it is not one thinking block, one answer block behind it, and nothing else"]),
        (f"So: {WHOLE}", ["it is not one thinking block, one answer block behind it, and nothing else"]),
        (WHOLE.replace("[1, 0, 0]", "(1, 0, 0)"), ["1 of 2 camera centres are neither [x, y, z] nor null"]),
        ("<thinking>left</thinking><answer>A</answer>", ["no camera centre is written in the thinking",
                                                         "no object centre is written in the thinking"]),
    ],
)  # fmt: skip
def test_what_is_missing_or_not_read(completion, said):
    assert list(unread(completion, reasoning=True)) == said


def test_nothing_is_missed_that_was_not_asked_for():
    assert unread("A", reasoning=False) == ()
    assert unread("<thinking>left</thinking>A", reasoning=False) == ()
    assert unread("<answer>A", reasoning=False) == ("<answer> is opened and never closed",)


TAGS = ["<thinking>", "</thinking>", "<answer>", "</answer>", "<think>", "</think>"]


@settings(deadline=None)
@given(st.lists(st.sampled_from([*TAGS, "Camera Center: ", "[1, 2, 3]", "A"]), max_size=12).map("".join))
def test_only_the_asked_form_has_nothing_to_say(text):
    assert all(isinstance(line, str) for line in unread(text, reasoning=False))
    if not unread(text, reasoning=True):
        assert "<thinking>" in text and "<answer>" in text
