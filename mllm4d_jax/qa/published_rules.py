"""How benchmarks themselves read an answer: the rule behind the figures that others report, however loose or odd it is.

`PUBLISHED` has the rule of each benchmark that came with a program for it, as that program computes it:

- vsi: github.com/vision-x-nyu/thinking-in-space, lmms_eval/tasks/vsibench/utils.py;
- sti: github.com/MINT-SJTU/STI-Bench, opensource_test.py;
- dsr: the rule of VLMEvalKit for Video-MME without a judge, on which the benchmark's own program is built;
- mmsi_video: github.com/InternRobotics/MMSI-Video-Bench, evaluation.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LetterRule = Callable[[str], str]
NumberRule = Callable[[str], float | None]

_STI_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        r"\(([A-E])\)",
        r"Ans\s*=\s*['\"]?([A-E])['\"]?",
        r"Answer\s*[:=]\s*([A-E])",
        r"Option\s+([A-E])",
        r"\b([A-E])\s*(?:is|was)\s*correct",
        r"\b([A-E])[\.\)]\s*$",
    )
)
_DSR_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",  # a comma is missing in the program
    "Best answer:Best option:",
    "Answer:",
    "Option:",
)
_MMSI_PHRASES = ('"answer":', "answer is", "answer:", '"Answer":', "Answer is", "Answer:")
_MMSI_LETTERS = frozenset("ABCDEF")
_MMSI_NOISE = str.maketrans(dict.fromkeys(" \"'\n:"))


@dataclass(frozen=True)
class PublishedRule:
    """How a benchmark's own program reads answers.

    Attributes:
      letter: a response -> what counts as the letter that was chosen; it is wrong unless it is one of an option.
      said: the rule in words, for tables.
      number: a response -> the number that was given; None where no question asks for one.
    """

    letter: LetterRule
    said: str
    number: NumberRule | None = None


def _first_word(response: str) -> str:
    return response.split(" ")[0].rstrip(".").strip()


def _first_number(response: str) -> float | None:
    try:
        value = float(_first_word(response))
    except ValueError:
        return None
    return value if math.isfinite(value) else None  # worth nothing in the program, too


def _sti_letter(response: str) -> str:
    found = next((match[1].upper() for pattern in _STI_PATTERNS if (match := pattern.search(response))), None)
    return (found or response.strip())[-1:]


def _dsr_letter(response: str) -> str:
    text = response.strip()
    for prefix in _DSR_PREFIXES:
        text = text.replace(prefix, "")
    match = re.search("[ABCD]", text)
    return match[0] if match else ""


def _mmsi_letter(response: str) -> str:
    text = response.replace("<answer>", "").replace("</answer>", "")
    if "no answer" in text:
        return ""
    if "boxed{" in text:
        text = text.split("boxed{")[1].split("}")[0]
    else:
        phrase = next((phrase for phrase in _MMSI_PHRASES if phrase in text), None)
        text = text.split(".")[0] if phrase is None else text.split(phrase)[-1].split(",")[0].split(".")[0]
    letter = text.translate(_MMSI_NOISE)
    return letter if letter in _MMSI_LETTERS else ""


PUBLISHED: Mapping[str, PublishedRule] = {
    "vsi": PublishedRule(
        lambda response: _first_word(response).upper(),
        "the benchmark's own rule: the text before the first space, less a full stop, must be the letter, in either "
        "case, or the number",
        _first_number,
    ),
    "sti": PublishedRule(
        _sti_letter,
        "the benchmark's own rule: the first of six patterns such as '(A)' and 'Answer: A' that occurs, in either "
        "case, else the last character of the response",
    ),
    "dsr": PublishedRule(
        _dsr_letter,
        "the benchmark's own rule: the first capital A, B, C or D, within words too, once phrases such as 'The "
        "answer is' are taken out",
    ),
    "mmsi_video": PublishedRule(
        _mmsi_letter,
        "the benchmark's own rule: what stands in \\boxed{}, after 'answer is' or 'answer:', or before the first full "
        "stop, must be a letter",
    ),
}
