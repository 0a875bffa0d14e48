"""How a question is written with its options, and how written options are read again."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping

from mllm4d_jax.qa.errors import RecordError

INSTRUCTION = "Answer with the letter of the correct option."
_HEADING = "Options:"
_LABELLED = re.compile(r"(?:\(([A-Z])\)|([A-Z])(?:[.:)]|\Z))\s*(.*)", re.DOTALL)


def lettered(options: Iterable[str]) -> dict[str, str]:
    """Return letter -> option, with the letters from A on in the order given; 26 options at most."""
    return dict(zip(string.ascii_uppercase, options, strict=False))


def write_question(question: str, choices: Mapping[str, str], instruction: str = INSTRUCTION) -> str:
    """Return a question with its options as lines `A. text`, and the instruction below unless it is empty."""
    lines = [question, _HEADING, *(f"{letter}. {option}" for letter, option in choices.items())]
    return "\n".join([*lines, instruction] if instruction else lines)


def split_question(text: str) -> tuple[str, dict[str, str]]:
    """Return (question, letter -> option) of a text that holds both; the options are {} where none are written.

    The options are the lines `A. text`, `A: text`, `A) text` or `(A) text` below the last "Options:", or of the whole
    text where that is missing; the question is what stands above them.

    Raises:
      RecordError: the letters of these lines are not A, B, ... in order.
    """
    above, heading, below = text.rpartition(_HEADING)
    lines = below.splitlines()
    labelled = [(n, *found) for n, line in enumerate(lines) if (found := split_label(line)) and found[1]]
    letters = [letter for _, letter, _ in labelled]
    if letters != list(string.ascii_uppercase[: len(letters)]):
        raise RecordError(f"the options written in the question have the letters {letters}, not A, B, ... in order")
    if not heading:
        above = "\n".join(lines[: labelled[0][0]] if labelled else lines)
    return above.strip(), {letter: option for _, letter, option in labelled}


def split_label(text: str) -> tuple[str, str] | None:
    """Return (letter, what follows it) of `A`, `A. text`, `A: text`, `A) text` or `(A) text`; None for anything else.

    This is for files, where an option may be written without a space; responses of models are read by `answers`.
    """
    match = _LABELLED.fullmatch(text.strip())
    return (match[1] or match[2], match[3]) if match else None
