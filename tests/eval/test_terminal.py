"""Questions from a terminal: a pseudo-terminal whose other end is this test."""

from __future__ import annotations

import os
import signal

import pytest

from mllm4d_jax.eval.terminal import converse, standard_input, typed_lines
from mllm4d_jax.qa.errors import RecordError


@pytest.fixture
def terminal(monkeypatch):
    """The end at which somebody types, as a file descriptor; the other one is the standard input."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "r") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield ours


def test_lines_are_asked_one_by_one_until_ctrl_d(terminal, capfd):
    os.write(terminal, b"What moves?\n\n  Where?  \nbad\nWhen?\n\x04")
    asked = []

    def ask(number, text):
        if text == "bad":
            raise RecordError("is bad", key=f"line {number}")
        asked.append((number, text))

    assert converse(typed_lines(standard_input()), ask, terminal=True) == 0
    assert asked == [(1, "What moves?"), (3, "Where?"), (5, "When?")]
    said = capfd.readouterr().err
    assert "Ctrl-D ends" in said and said.count("> ") == 6 and "error: line 4: is bad" in said
    os.close(terminal)


def test_a_terminal_that_goes_away_ends_it_once_the_answer_is_there(terminal):
    os.write(terminal, b"What moves?\nWhere?\n")
    asked = []

    def ask(number, text):
        os.kill(os.getpid(), signal.SIGHUP)  # as the system says it
        asked.append(text)
        if len(asked) == 2:
            os.close(terminal)

    before = signal.getsignal(signal.SIGHUP)
    assert converse(typed_lines(standard_input()), ask, terminal=True) == 0
    assert asked == ["What moves?", "Where?"] and signal.getsignal(signal.SIGHUP) == before


@pytest.mark.parametrize("here", [True, False])
def test_ctrl_c_ends_a_terminal_and_interrupts_a_file(here):
    def ask(number, text):
        raise KeyboardInterrupt

    if here:
        assert converse(iter([(1, "What?")]), ask, terminal=True) == 0
    else:
        with pytest.raises(KeyboardInterrupt):
            converse(iter([(1, "What?")]), ask, terminal=False)


def test_a_closed_input_is_an_empty_one(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert list(typed_lines(standard_input())) == []
