"""Completions with their parts marked, and how long texts are cut."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mllm4d_jax.qa.reasoning import parse
from mllm4d_jax.report.browser import pieces, said
from mllm4d_jax.report.page import shortened
from tests.report.reading import read

PARTS = ["<thinking>", "</thinking>", "<answer>", "</answer>", "a", "B\n", " ", "<", "é"]


@example("<answer>A</answer> or <answer>B</answer>")
@example("<answer>a<answer>b</answer>c</answer>")
@example("<answer>a<answer>b</answer><answer>c</answer>")
@example("<thinking>x<thinking>y</thinking>z</thinking><answer>A</answer>")
@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join))
def test_the_marks_are_what_the_reward_reads(text):
    found, parsed = pieces(text), parse(text)
    assert "".join(part for _, part in found) == text
    thinking = re.search("<thinking>.*?</thinking>", text, re.DOTALL)
    answer = [*re.finditer("<answer>.*?</answer>", text, re.DOTALL)][-1:]
    wanted = [""] * len(text)
    for kind, match in (("thinking", thinking), *(("answer", match) for match in answer)):
        if match:
            wanted[slice(*match.span())] = [kind] * len(match[0])
    assert [kind for kind, part in found for _ in part] == wanted
    assert (thinking is not None, len(answer) > 0) == (parsed.thinking is not None, parsed.answer is not None)
    assert not answer or answer[0][0][len("<answer>") : -len("</answer>")].strip() == parsed.answer


def test_an_answer_inside_the_thinking_is_marked_as_the_answer():
    text = "x<thinking>a <answer>B</answer> c</thinking>"
    assert pieces(text) == [("", "x"), ("thinking", "<thinking>a "), ("answer", "<answer>B</answer>"),
                            ("thinking", " c</thinking>")]  # fmt: skip


def test_marks_become_classes_and_the_text_stays():
    text = "<thinking>a < b</thinking>\n<answer>C</answer>"
    box = read(said(text, 1000)).all("div", "said")[0]
    assert box.text == text
    assert [e.text for e in box.all("span", "thought")] == ["<thinking>a < b</thinking>"]
    assert [e.text for e in box.all("span", "answer")] == ["<answer>C</answer>"]


def test_an_empty_completion_says_so():
    assert "empty" in read(said("", 100)).text


@pytest.mark.parametrize(
    "text", ["a" * 70_000, "'\"<&" * 20_000, "\U0001f600" * 30_000, "\ud800" * 70_000, "a" * 60_000 + "<" * 9000]
)
def test_long_texts_are_cut_to_the_bytes_allowed_and_keep_both_ends(text):
    made = shortened(text, 5000)
    assert 2500 < len(made.encode("utf-8")) <= 5000 + 100  # the note about the cut is extra
    shown = read(made)
    cut = shown.all("span", "cut")[0]
    head, tail = shown.parts[0], shown.parts[-1]
    if "\ud800" not in text:
        assert text.startswith(head) and text.endswith(tail)
        assert f"{len(text) - len(head) - len(tail):,} characters" in cut.text


def test_short_texts_are_left_alone():
    assert shortened("a<b", 100) == "a&lt;b"
    assert shortened("x" * 5000, 5000) == "x" * 5000


def test_hostile_completions_take_no_time_and_no_room():
    started = time.process_time()
    for text in ("<answer></answer>" * 4000, "<thinking>" * 6500, "</answer>" * 7000, "<answer>" * 8000):
        assert len(said(text, 12_000).encode("utf-8")) < 25_000
    assert time.process_time() - started < 2
