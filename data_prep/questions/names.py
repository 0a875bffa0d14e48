"""What an object is called: the noun phrase of its caption, without the words that tell how or where it moves.

"A man in a red shirt walks to the left." becomes "the man in a red shirt": what gives the answer away is cut,
nothing else; what then has no name is refused with a reason. Rules and word lists (`lexicon`), no model. A place in the
picture ("on the left") goes with the verbs, since it hints which way is open and is true of one moment only; places in
the scene ("at the table") and sides of a thing ("the left shoe") stay.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from data_prep.questions import lexicon as lex
from data_prep.scenes.scene import Scene

MAX_NAME = 160
_CONTROL = re.compile(r"[<>\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028\u2029\ud800-\udfff]")
_WORD = re.compile(r"[^\W_]+(?:[-'’./][^\W_]+)*|[,()]")
_SENTENCE = re.compile(r"(?<!\bMr)(?<!\bDr)(?<!\bSt)[.!?;:](?:\s|$)|\s[-–—]\s")
_PICTURE = "image|picture|photo|photograph|video|clip|footage|scene|frame|shot|view"
_OPENERS = re.compile(
    rf"""(?:(?:the|this|a|an)\s+)?
      (?:(?:close-?up|front|side|rear|back|outlined|highlighted|masked|marked|segmented|tracked|target|main)\s+)?(?:
        (?:{_PICTURE}|close-?up|caption|object|subject|region|area|mask|entity|target)\s+
          (?:in\s+(?:the|this)\s+(?:{_PICTURE})\s+)?
          (?:shows|shown\ is|depicts|features|contains|captures|displays|is)\s
      | (?:image|picture|photo|photograph|video|clip|footage|shot|view|close-?up)\s+of\s
      | (?:caption|object|answer|description)\s*:\s
    ) | (?:there\ (?:is|are)|it\ is|it's|this\ is|that\ is|these\ are|(?:we|i|you)\ (?:can\ )?see|here\ is|sure,?)\s
      | in\s+(?:the|this)\s+(?:{_PICTURE})\s
      | (?:in|on|at|to|near|from|along|across|behind|beside|inside)\s[^,]{{1,60}},\s""",
    re.IGNORECASE | re.VERBOSE,
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?|one|two|three|four|five|six|seven|eight|nine|ten|twenty", re.IGNORECASE)
_NO_NOUN = "it names no thing apart from how or where it moves"
_LOST_END = frozenset({",", "and", "or", "of"}) | lex.DETERMINERS | lex.POSITION | lex.ATTRIBUTE | lex.LOOKS


class Unnamed(ValueError):
    """A description gives no name; the message says why."""


class Name(NamedTuple):
    """A name: `text` begins with "the"; `head`: its noun in lower case; `words`: all of it, in lower case."""

    text: str
    head: str
    words: frozenset[str]


def spoken_name(text: str) -> Name:
    """Return the name that a description gives ("A red box." -> "the red box").

    Raises:
      Unnamed: it is blank, has control characters or angle brackets (which could pass for a placeholder), its noun
        phrase is longer than `MAX_NAME`, or nothing is left but how or where the thing moves.
    """
    if _CONTROL.search(text):
        raise Unnamed("it holds control characters or angle brackets")
    parts = _noun_phrase(_tokens(" ".join(text.split())))
    words = [word for part in parts for word in part]
    phrase = " ".join(words).replace(" ,", ",")
    head = _head(parts[0])
    if len(phrase) > MAX_NAME:
        raise Unnamed(f"its noun phrase has {len(phrase)} characters, more than {MAX_NAME}")
    return Name(f"the {phrase}", head, frozenset(word.lower() for word in words))


def object_names(scene: Scene) -> tuple[dict[str, str], dict[str, str]]:
    """Name the objects of a scene: (object_id -> what it is called, object_id -> why it has no name).

    The description is preferred; the category stands in for one that names nothing or another object, too. A name that
    two objects of the clip could go by names neither: "the car" beside "the red car" is not used.
    """
    found: dict[str, list[Name]] = {}
    refused = {}
    for o in scene.objects:
        found[o.object_id] = []
        for text in (o.description, o.category):
            try:
                name = spoken_name(text)
            except Unnamed as error:
                refused.setdefault(o.object_id, str(error))
            else:
                found[o.object_id].append(name)
    names = {}
    for object_id, own in found.items():
        others = [name for other, theirs in found.items() if other != object_id for name in theirs]
        fitting = next((n for n in own if not any(_could_be(n, other) for other in others)), None)
        if fitting:
            names[object_id] = fitting.text
            refused.pop(object_id, None)
        elif own:
            refused[object_id] = f'"{own[0].text}" could be said of two objects of the clip'
        else:
            refused.setdefault(object_id, _NO_NOUN)
    return names, refused


def _could_be(name: Name, other: Name) -> bool:
    """Whether what is called `other` could go by `name`, too."""
    return name.head == other.head and name.words <= other.words


def _tokens(text: str) -> list[str]:
    """Words, commas and hyphenated words of the first sentence, without "the picture shows" and what is in brackets."""
    text = text.strip(" \"'“”*_.,;:!?-")
    while (opener := _OPENERS.match(text)) and opener.end() < len(text):
        text = text[opener.end() :].lstrip(" \"'“”*,:")
    text = re.sub(r"\([^()]*\)", " ", text).replace("&", " and ").replace("/ ", ", ")
    tokens = _WORD.findall(_SENTENCE.split(text, maxsplit=1)[0])
    tokens = [t for t in tokens if t not in "()"]
    if all(t.istitle() for t in tokens) or len(tokens) > 1 and all(t.isupper() for t in tokens):
        tokens = [t.lower() for t in tokens]
    elif tokens[0].istitle():
        tokens[0] = tokens[0].lower()
    return [lex.SOMETHING.get(t.lower(), t) for t in tokens]


def _noun_phrase(tokens: list[str]) -> list[list[str]]:
    """Return the head and the phrases after it that describe looks, each a list of words. Raises Unnamed."""
    if not tokens or tokens[0].lower() in lex.NOTHING:
        raise Unnamed("it names nothing")
    if [t.lower() for t in tokens[:2]] in (["one", "of"], ["each", "of"], ["some", "of"], ["part", "of"]):
        raise Unnamed("it means one of several")
    parts: list[list[str]] = [[]]
    at = 0
    while at < len(tokens):
        at = _take(tokens, at, parts)
    parts = [_trimmed(part) for part in parts]
    if {"from", "left"} <= {*map(str.lower, tokens)} or {"from", "right"} <= {*map(str.lower, tokens)}:
        parts[0] = [word for word in parts[0] if word.lower() not in lex.ORDINALS]
    while parts[0] and (parts[0][0].lower() in lex.DETERMINERS or parts[0][0].lower() == "one" and len(parts[0]) > 1):
        parts[0].pop(0)
    if not _has_noun(parts[0], whole=True) or parts[0][0].lower() in lex.ATTRIBUTE | lex.POSITION | lex.LOOKS:
        raise Unnamed(_NO_NOUN)
    if "of" in parts[0] and not _has_noun(parts[0][: parts[0].index("of")], whole=True):
        raise Unnamed("it means one of several")
    return [parts[0], *(part for part in parts[1:] if len(part) > 1 and not _tells_place(part))]


def _take(tokens: list[str], at: int, parts: list[list[str]]) -> int:
    """Take or leave the word at `at`; returns where to go on."""
    word, part = tokens[at].lower(), parts[-1]
    following = tokens[at + 1].lower() if at + 1 < len(tokens) else ""
    headed = _has_noun(parts[0], whole=True)
    # "a woman in red": a colour without an article is the noun.
    noun = _has_noun(part) or len(parts) > 1 and part[-1].lower() in lex.COLOURS and lex.DETERMINERS.isdisjoint(part)
    if _is_compound(tokens, at):
        part.append(tokens[at])
    elif word in lex.RELATIVE and headed:
        return _after_clause(tokens, at)
    elif word in lex.AUXILIARY and headed:
        return at + 1 if following in lex.LOOKS | lex.ATTRIBUTE else _after_clause(tokens, at)
    elif word in lex.FINITE or word in lex.PARTICIPLES:
        return _take_motion(tokens, at, part, noun, headed)
    elif headed and (word in lex.CLAUSE or noun and _is_third_person(word, part, following)):
        return _after_clause(tokens, at)
    elif word in lex.SIDES and following == "of" and headed:
        parts.append(["to"])
    elif word in lex.SIDES:
        _take_side(tokens, at, part)
    elif following in lex.UNITS and _NUMBER.fullmatch(word) or word in lex.UNITS and at and _is_amount(tokens[at - 1]):
        pass  # "3 metres away" tells a distance
    elif word in ("up", "down") and following in lex.DETERMINERS and headed:
        parts.append(["to"])
    elif word in lex.MOTION or _is_telling_hyphen(word):
        pass
    elif headed and word in lex.DIRECTIONAL and not (word == "to" and part[-1:] in (["next"], ["close"])):
        parts.append(["to"])
    elif headed and (word in lex.POSITION or word in lex.ATTRIBUTE or word in lex.LOOKS and noun):
        parts.append([tokens[at]])
    elif word == "," and following in lex.DETERMINERS and headed:
        return len(tokens)
    elif word == "," and not (part and _is_plain(following) and not _is_verb(following)):
        pass
    elif word in ("a", "an") and part[-1:] == ["and"] and len(parts) == 1:
        part.append("the")
    else:
        part.append(tokens[at])
    return at + 1


def _take_motion(tokens: list[str], at: int, part: list[str], noun: bool, headed: bool) -> int:
    """Take or leave a verb of motion.

    Before its noun a participle is left out ("the parked van"); after one, verb and clause are ("a man walks ..."). A
    word that cannot be a verb where it stands is a noun ("two black flies", "a fruit stand").
    """
    word = tokens[at].lower()
    if part and part[-1].lower() in lex.RIDDEN and word in lex.RIDING:
        if _has_noun(part[:-1]) or _starts_noun(tokens, at + 1):
            part.pop()
        return _after_clause(tokens, at) if part and _has_noun(part) else at + 1
    following = tokens[at + 1].lower() if at + 1 < len(tokens) else ""
    goes_on = lex.DIRECTIONAL | lex.MOTION | lex.SIDES | lex.DETERMINERS | lex.AUXILIARY
    kinds = lex.NOUNS_TOO if noun else lex.NOUNS_TOO | lex.NOUNS_TOO_PLURAL
    verb = following in goes_on or following.endswith("ly") or "," in part or noun and _is_plural(part)
    if part and word in kinds and not verb:
        part.append(tokens[at])
        return at + 1
    if noun or word not in lex.PARTICIPLES:
        return _after_clause(tokens, at) if headed else len(tokens)
    while part and part[-1].lower().endswith("ly"):
        part.pop()
    return at + 1 if _starts_noun(tokens, at + 1) else _after_clause(tokens, at)


def _take_side(tokens: list[str], at: int, part: list[str]) -> None:
    """ "left" and "right" stay before what comes in pairs, and where they make a phrase tell a place in the picture."""
    ahead = [_singular(t.lower()) for t in tokens[at + 1 : at + 3]]
    paired = ahead[:1] and ahead[0] in lex.PAIRED and ahead[1:] != ["side"]
    if paired or part and part[0].lower() in lex.POSITION:
        part.append(tokens[at])


def _after_clause(tokens: list[str], at: int) -> int:
    """Skip a verb and its way ("slowly down the street"); returns the place of a description of looks, or the end.

    Behind an object of the verb nothing is taken up: in "a man walks a dog in a coat" the coat could be the dog's.
    """
    verbs = lex.FINITE | lex.PARTICIPLES | lex.AUXILIARY | lex.CLAUSE | lex.MOTION | lex.SIDES | lex.RELATIVE
    on_the_way = False
    while at < len(tokens):
        word = tokens[at].lower()
        if word in lex.LOOKS or word in lex.ATTRIBUTE:
            return at
        if word in lex.DIRECTIONAL | lex.POSITION:
            if word == "in" and _describes_clothes(tokens, at):
                return at
            on_the_way = True
        elif not (
            word in verbs
            or word in (",", "and", "of")
            or word.endswith("ly")
            or on_the_way
            and word in lex.ON_THE_WAY | lex.DETERMINERS
        ):
            return len(tokens)
        at += 1
    return at


def _describes_clothes(tokens: list[str], at: int) -> bool:
    """Whether "in" begins "in a red shirt" rather than "in the street" or "in a circle"."""
    rest = [t.lower() for t in tokens[at + 1 : at + 5]]
    return bool(rest) and rest[0] not in ("the", "this") and not set(rest) & lex.REGION


def _is_compound(tokens: list[str], at: int) -> bool:
    word = tokens[at].lower()
    if word == "crossing" and at and tokens[at - 1].lower() in lex.CROSSINGS:
        return at + 1 == len(tokens) or tokens[at + 1].lower() not in lex.DETERMINERS
    if word not in lex.COMPOUNDS:
        return False
    ahead = [t.lower() for t in tokens[at + 1 : at + 3]]
    if len(ahead) > 1 and not _is_plain(ahead[0]):
        ahead = []
    return any(t in lex.COMPOUNDS[word] or _singular(t) in lex.COMPOUNDS[word] for t in ahead)


def _starts_noun(tokens: list[str], at: int) -> bool:
    """Whether a noun phrase goes on at `at`, so that a participle before it belongs to that noun."""
    return at < len(tokens) and _is_plain(tokens[at].lower())


def _is_plain(word: str) -> bool:
    """Whether a word is a noun or an adjective, by not being anything else."""
    kinds = (lex.DETERMINERS, lex.DIRECTIONAL, lex.POSITION, lex.ATTRIBUTE, lex.AUXILIARY, lex.RELATIVE, lex.LOOKS)
    return word not in (",", "and", "or", "of") and not any(word in kind for kind in (*kinds, lex.MOTION, lex.SIDES))


def _is_adjective(word: str) -> bool:
    word = word.lower()
    if word in lex.NOT_ADJECTIVES:
        return False
    if word in lex.ADJECTIVES or word.endswith(lex.ADJECTIVE_ENDINGS) or word[0].isdigit():
        return True
    return word.endswith("ed") and len(word) > 3 and word not in lex.NOUNS_IN_ED


def _is_plural(part: list[str]) -> bool:
    word = part[-1].lower()
    return word in lex.PLURALS or word.endswith("s") and word not in lex.SINGULARS_IN_S


def _is_verb(word: str) -> bool:
    return word in lex.FINITE or word in lex.PARTICIPLES or word in lex.CLAUSE


def _is_third_person(word: str, part: list[str], following: str) -> bool:
    """Whether a word in -s after a noun is a verb: "a dog barks", "the man eats an apple", "the car speeds away"."""
    if not word.endswith("s") or word in lex.SINGULARS_IN_S or word.endswith(("ss", "us", "is", "'s", "’s")):
        return False
    if part[-1].endswith("ing") or any(w.endswith(("'s", "’s", "s'", "s’")) for w in part) or not _has_noun(part[-1:]):
        return False
    one = part[0].lower() in lex.SINGULAR and "of" not in part and not _is_plain(following or ",")
    on_the_move = word in lex.PERHAPS_FINITE and following in lex.DIRECTIONAL | lex.MOTION | lex.SIDES
    return one or on_the_move or following in lex.DETERMINERS


def _is_amount(word: str) -> bool:
    return bool(_NUMBER.fullmatch(word))


def _is_telling_hyphen(word: str) -> bool:
    first, _, last = word.rpartition("-")
    return bool(first) and (last in lex.TELLING_ENDINGS or last in lex.UNITS and _is_amount(first))


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") else word


def _has_noun(part: list[str], whole: bool = False) -> bool:
    """Whether a noun stands in the running noun phrase (since the last "of", "and" or article), or in all of it."""
    for word in reversed(part):
        plain = _is_plain(word.lower())
        if not plain and not whole:
            return False
        if plain and (not _is_adjective(word) or whole and word == part[-1] == "orange"):
            return True
    return False


def _head(part: list[str]) -> str:
    """The noun of a head: the last word before "of" or "playing with a ball"."""
    for n, word in enumerate(part):
        participle = word.endswith("ing") and word.lower() not in lex.NOUNS_IN_ING and _has_noun(part[:n])
        if n and (word.lower() == "of" or participle):
            return part[n - 1].lower()
    return next((word.lower() for word in reversed(part) if word != "," and not _is_adjective(word)), part[-1].lower())


def _trimmed(part: list[str]) -> list[str]:
    """Without what a cut leaves at the end: "a man and", "a dog quickly"."""
    while part and (part[-1].lower() in _LOST_END or part[-1].endswith("ly") and _is_adjective(part[-1])):
        part = part[:-1]
    return part


def _tells_place(part: list[str]) -> bool:
    words = {word.lower() for word in part}
    return part[0] == "to" or part[0].lower() in lex.POSITION and bool(words & lex.REGION)
