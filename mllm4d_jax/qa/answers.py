"""Which option a response chose: a fixed order of rules, no judge, and nothing in the response is trusted.

The part of the response that counts is `reasoning.answer_part`, without the list of options where the response repeats
it: two or more of them in order from the first one on, each with its letter and its text. The rules, the first that
finds an option decides:

1. `letter`: the part is an option's letter as in `A`, `(A)`, `A.` or `A: left`; capital letters only. Where the first
   two lines begin with the letters of the first two options, the options are gone through, and no letter is given.
2. `text`: the part is an option's text; case and punctuation do not count.
3. `answer_is`: the last "answer is" or "answer:" that is followed by a letter standing alone or, up to the end of its
   line, by the text of one option and of no other.
4. `mention`: one option's text, and no other's, occurs in the part. "clockwise" within "counter-clockwise" is no
   mention where both are options, and neither is "not left" one of "left".

Anything else is unparsed, and a question whose answer is unparsed is wrong. The time is linear in the length.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mllm4d_jax.qa.reasoning import answer_part, find_blocks, said

EXTRACTORS = ("strict", "official")
RULES = ("letter", "text", "number", "answer_is", "mention", "exact", "official", "unparsed")

_WORD = re.compile(r"(?:(?<!\w)-)?\d+(?:\.\d+)*|[^\W\d_]+")
_APOSTROPHES = str.maketrans({"'": None, "\u2019": None, "\u2212": "-"})
EMPHASIS = str.maketrans({"*": None, "`": None})
_LETTER = re.compile(r"(?:\(([A-Z])\)|([A-Z])(?:[:)]|\.(?=\s|$))|([A-Z])$)(.*)", re.DOTALL)
_LABEL = re.compile(r"\s*(?:[-\u2022]\s*)?(?:\(([A-Z])\)|([A-Z])[.:)])")  # of a line of a list
_BETWEEN = r"[\s,;|\u2022-]+"  # the entries of a list
ANSWER_IS = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)\s*(?:(?:option|choice)\s+)?", re.IGNORECASE)
# "The answer is A dog" names no letter: an A before a word is the article, unless a reason follows.
_STATED = re.compile(r"\(([A-Z])\)|(?!A\s+(?!(?:because|since|as)\b)[^\W\d_])([A-Z])(?![\w'\u2019-])")
MAX_STATED = 64  # of the places that say "answer is", the last so many are looked at
MAX_CLAUSE = 400  # characters after "answer is", or of the line after a letter, that are read
_NEGATIONS = ("not", "no", "never", "isnt", "arent", "wasnt", "doesnt", "dont", "cannot")


@dataclass(frozen=True)
class ExtractedAnswer:
    """What a response chose.

    Attributes:
      letter: a key of the choices; None when unparsed. Of several options with the chosen text, the first.
      rule: one of `RULES`, the one that decided.
      conflict: a letter was given together with the text of another option; the letter counts.
      number: what was given where a number is asked for (`numbers`); None when unparsed, and where a letter is.
    """

    letter: str | None
    rule: str
    conflict: bool = False
    number: float | None = None


_UNPARSED = ExtractedAnswer(None, "unparsed")


def extract_answer(response: str, choices: Mapping[str, object], extractor: str = "strict") -> ExtractedAnswer:
    """Return the option that a response chose. Any string is accepted, nothing is raised for what it says.

    Args:
      response: the model's text.
      choices: letter -> option; an option that is a number counts as its text.
      extractor: "strict" goes by the rules of this module. "official" stands for the release's own evaluation, as far
        as that is known. Known: its accuracy reward compares the stripped text inside `<answer>` exactly; the responses
        it published are single letters or empty; its final figure comes from a language model that is shown the truth.
        Inferred: that the published letters come from the same exact comparison, on the last `<answer>` block or else
        the whole response (less the thought of a thinking model). What it cannot read is left to that judge, which is
        not reproduced here.

    Raises:
      ValueError: unknown extractor.
    """
    if extractor not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {', '.join(EXTRACTORS)}, not {extractor!r}")
    if extractor == "official":
        _, answers = find_blocks(response)
        given = answers[-1].text if answers else response[said(response)].strip()
        return ExtractedAnswer(given, "exact") if given in choices else _UNPARSED
    options = _Options(choices)
    return _by_the_rules(options.without_list(answer_part(response).translate(EMPHASIS)).strip(), options)


def plain_text(value: object) -> str:
    """Return the words and numbers of a text, one space apart, without case. `2` and `"2"` are the same."""
    return " ".join(_WORD.findall(str(value).translate(_APOSTROPHES).casefold()))


def same_option(value: object) -> str:
    """Return what two options that are the same have in common: their text, less case and white space around words."""
    return " ".join(str(value).split()).casefold()


def true_letters(choices: Mapping[str, object], answer: object) -> tuple[str, ...]:
    """Return all letters whose option has the text of the true one; () when none has, two if it is there twice."""
    wanted = same_option(answer)
    return tuple(letter for letter, option in choices.items() if same_option(option) == wanted)


class _Options:
    """The choices, ready to be looked for; what takes a pattern of them is compiled when it is needed."""

    def __init__(self, choices: Mapping[str, object]) -> None:
        self.plain = {letter: plain_text(option) for letter, option in choices.items()}
        self.first: dict[str, str] = {}
        for letter, text in self.plain.items():
            if text:
                self.first.setdefault(text, letter)
        self._spelled = {letter: str(option).translate(EMPHASIS) for letter, option in choices.items()}
        self._first_two = tuple(choices)[:2]

    @functools.cached_property
    def _mention(self) -> re.Pattern[str] | None:
        # Longest first: where one option begins with another, the longer one is meant.
        named = "|".join(re.escape(text) for text in sorted(self.first, key=len, reverse=True))
        denied = "|".join(_NEGATIONS)
        return re.compile(rf"(?<!\S)(?:({named})|(?:{denied}) (?:{named}))(?!\S)") if named else None

    @functools.cached_property
    def _list(self) -> re.Pattern[str] | None:
        return _list_of(self._spelled)

    def without_list(self, part: str) -> str:
        """The part without the options where it repeats them as a list."""
        first_two = (" ".join(self._spelled[letter].split()) for letter in self._first_two)
        if len(part) < sum(map(len, first_two)) or self._list is None:
            return part
        return self._list.sub("\n", part)

    def goes_through(self, part: str) -> bool:
        """The first two lines begin with the letters of the first two options."""
        lines = (line for line in part.splitlines() if line.strip())
        found = [_LABEL.match(line) for line in itertools.islice(lines, 2)]
        return len(found) == 2 and None not in found and tuple(m[1] or m[2] for m in found) == self._first_two

    def mentioned(self, plain: str) -> str | None:
        """The letter of the only option whose text occurs in a plain text."""
        if self._mention is None:
            return None
        named = {match[1] for match in self._mention.finditer(plain)} - {None}
        return self.first[named.pop()] if len(named) == 1 else None


def _list_of(choices: Mapping[str, str]) -> re.Pattern[str] | None:
    """Matches the first two options or more as they stand in a question, with the heading; None where one is blank."""
    texts = {letter: r"\s+".join(map(re.escape, option.split())) for letter, option in choices.items()}
    if len(texts) < 2 or not all(texts.values()):
        return None
    entries = [rf"\(?{re.escape(letter)}[.:)]\s*(?i:{text})(?!\w|\.\d)" for letter, text in texts.items()]
    following = ""
    for entry in reversed(entries[2:]):
        following = rf"(?:{_BETWEEN}{entry}{following})?"
    return re.compile(rf"(?:(?i:\boptions?:)\s*)?(?<!\w){entries[0]}{_BETWEEN}{entries[1]}{following}")


def _by_the_rules(part: str, options: _Options) -> ExtractedAnswer:
    match = _LETTER.match(part)
    if match and not options.goes_through(part):
        letter = match[1] or match[2] or match[3]
        if letter in options.plain:
            return ExtractedAnswer(letter, "letter", _contradicts(letter, match[4], options))
    plain = plain_text(part)
    letter = options.first.get(plain)
    if letter is not None:
        return ExtractedAnswer(letter, "text")
    stated = _stated(part, options)
    if stated is not None:
        return stated
    letter = options.mentioned(plain)
    return _UNPARSED if letter is None else ExtractedAnswer(letter, "mention")


def _stated(part: str, options: _Options) -> ExtractedAnswer | None:
    """Rule 3, from the last place backwards."""
    places = [match.span() for match in ANSWER_IS.finditer(part)]
    end = len(part)
    for start, after in reversed(places[-MAX_STATED:]):
        clause = part[after : min(end, after + MAX_CLAUSE)].partition("\n")[0]
        end = start
        letter, rest = _stated_letter(clause, options)
        if letter is not None:
            return ExtractedAnswer(letter, "answer_is", _contradicts(letter, rest, options))
        letter = options.mentioned(plain_text(clause))
        if letter is not None:
            return ExtractedAnswer(letter, "answer_is")
    return None


def _contradicts(letter: str, rest: str, options: _Options) -> bool:
    """What follows the letter gives another answer: its first line, what it states, or the only option it mentions."""
    line = rest.strip().partition("\n")[0]
    said = options.first.get(plain_text(line)) if len(line) <= MAX_CLAUSE else None
    if said is None:
        places = [match.end() for match in ANSWER_IS.finditer(rest)]
        stated = _stated_letter(rest[places[-1] :], options)[0] if places else None
        said = options.mentioned(plain_text(rest)) if stated is None else stated
    return said is not None and options.plain[said] != options.plain[letter]


def _stated_letter(clause: str, options: _Options) -> tuple[str | None, str]:
    """The letter of an option with which a clause begins, None without one, and what follows it."""
    match = _STATED.match(clause)
    letter = (match[1] or match[2]) if match else None
    return (letter, clause[match.end() :]) if letter in options.plain else (None, clause)
