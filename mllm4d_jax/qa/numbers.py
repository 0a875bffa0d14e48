"""Numeric answers: which number a response gives, and how much it is worth. Nothing in the response is trusted.

The part of the response that counts is `reasoning.answer_part`. The rules, the first that finds a number decides:

1. `number`: the part is a number and nothing more, in digits or as one of the words zero to twenty.
2. `answer_is`: the last "answer is" or "answer:" in whose sentence a number follows, and no other number.
3. `mention`: the part has one number and no other; several mentions of the same are one.

Anything else is unparsed and worth nothing, a range ("2-3 m") included. A unit is not read: the question asks for one.
"""

from __future__ import annotations

import re

import numpy as np

from mllm4d_jax.qa.answers import ANSWER_IS, EMPHASIS, MAX_CLAUSE, MAX_STATED
from mllm4d_jax.qa.reasoning import answer_part, parse_number

# arXiv 2412.14171, equation 1: how much of the true number an answer may miss is 1 less each of these.
CONFIDENCES = np.linspace(0.5, 0.95, 10)
_WORDS = {
    word: float(n)
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
_DIGITS = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d++)(?:\.\d++)?(?:[eE][-+]?\d++)?|[-+\u2212]?\.\d++"
# Neither within a word nor the exponent of a unit (m2, m^2); "2-3" are two numbers, "2.5m" is one, and "2,5" is none.
_NUMBER = re.compile(
    rf"(?<![\w.^])(?<!\d,)(?:({_DIGITS})(?![.,]?\d|[eE][-+]?\d)|({'|'.join(_WORDS)})\b)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|[.;!?]\s")


def extract_number(response: str) -> tuple[float | None, str]:
    """Return (the number that a response gives, None if unparsed; the rule that decided). Any string is accepted."""
    part = answer_part(response).translate(EMPHASIS).strip()
    match = _NUMBER.fullmatch(part.rstrip("."))
    if match:
        value = _value(match)
        return value, "unparsed" if value is None else "number"
    end = len(part)
    for start, after in reversed([m.span() for m in ANSWER_IS.finditer(part)][-MAX_STATED:]):
        value = _only_number(_SENTENCE_END.split(part[after : min(end, after + MAX_CLAUSE)], maxsplit=1)[0])
        end = start
        if value is not None:
            return value, "answer_is"
    value = _only_number(part)
    return value, "unparsed" if value is None else "mention"


def mean_relative_accuracy(given: float, truth: float) -> float:
    """Return what a number is worth, 0 to 1: the share of `CONFIDENCES` t for which |given - truth| / truth <= 1 - t.

    The paper writes <, its program <=; this is its program's, in float64 as there.

    Args:
      truth: above 0.
    """
    return float(np.mean(abs(given - truth) / truth <= 1 - CONFIDENCES))


def _only_number(text: str) -> float | None:
    found = {_value(match) for match in _NUMBER.finditer(text)}
    return found.pop() if len(found) == 1 else None


def _value(match: re.Match[str]) -> float | None:
    digits, word = match.groups()
    return _WORDS[word.lower()] if word else parse_number(digits.replace(",", "").replace("\u2212", "-"))
