"""What a completion says: thinking and answer, where they stand, and the centres written in the thinking.

The text comes from a model that is rewarded for what is found in it, so nothing in it is trusted: every string is
accepted, nothing is evaluated, and the work is linear in the length (searches only go forward, and at most
`MAX_CENTER_CHARS` characters after a marker are read).

A thinking model of Qwen's thinks in `<think>...</think>` before it says anything, and its prompt may have opened the
thought. Nothing in that thought is said (`said`): it tries answers and quotes forms that it does not mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

Vec3 = tuple[float, float, float]

MAX_CENTER_CHARS = 160  # of "[x, y, z]"; white space in front of it is free
MAX_CENTERS = 256  # of one kind; no question has more than a few states
MAX_NUMBER_CHARS = 32
MAX_METRES = 1e6  # a centre farther away than this is no position in a video

_MARKER = re.compile("(Camera|Object) Center:[ \t]*")
_NULL = re.compile(r"null(?!\w)")
_NUMBER_CHARS = frozenset("0123456789+-.eE")
_THOUGHT = ("<think>", "</think>")
_TAGS = ("<thinking>", "</thinking>", "<answer>", "</answer>")


class Block(NamedTuple):
    """A closed block: where it begins and ends, tags included, and the stripped text inside."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class ParsedReasoning:
    """A completion taken apart.

    Attributes:
      thinking: stripped text of the first closed `<thinking>` block; None without one.
      answer: stripped text of the last closed `<answer>` block, wherever it stands; None without one.
      answers_agree: all closed `<answer>` blocks have the same text (True if there is only one, or none).
      well_formed: one thinking block, then one answer block, and nothing but white space around them is `said`.
      camera_centers: metres, in the order written in the thinking; None for a written `null`. Malformed ones are left
        out here and counted below.
      object_centers: likewise.
      malformed_cameras: how often `Camera Center:` is followed by something that is neither; from `MAX_CENTERS` on,
        every further marker counts as such, whatever follows.
      malformed_objects: likewise.
    """

    thinking: str | None
    answer: str | None
    answers_agree: bool
    well_formed: bool
    camera_centers: tuple[Vec3 | None, ...]
    object_centers: tuple[Vec3 | None, ...]
    malformed_cameras: int
    malformed_objects: int


def said(completion: str) -> slice:
    """Return where a completion speaks: behind the last `</think>`, up to a `<think>` that is never closed."""
    start = completion.rfind(_THOUGHT[1])
    start = 0 if start < 0 else start + len(_THOUGHT[1])
    end = completion.find(_THOUGHT[0], start)
    return slice(start, len(completion) if end < 0 else end)


def with_prompt(prompt: str, generated: str) -> str:
    """Return what a model said: what it generated, after the `<think>` with which its prompt ends, if it does."""
    return f"{_THOUGHT[0]}\n{generated}" if prompt.rstrip().endswith(_THOUGHT[0]) else generated


def answer_part(response: str) -> str:
    """Return the text of the last `<answer>` block, else what follows the last `</thinking>`, else all; stripped.

    Only what is `said` counts.
    """
    _, answers = find_blocks(response)
    return answers[-1].text if answers else response[said(response)].rpartition("</thinking>")[2].strip()


def find_blocks(completion: str) -> tuple[Block | None, list[Block]]:
    """Return the first closed `<thinking>` block and all closed `<answer>` blocks, of which the last counts.

    Blocks in the thought of a thinking model are none (`said`).

    Any string is accepted, in time linear in its length. A block reaches from an opening tag to the next closing tag of
    the same name; opening tags in between are part of its text, and a block that is never closed is none. Tags are
    case-sensitive.
    """
    where = said(completion)
    thinking, answers = (_blocks(completion[: where.stop], name, where.start) for name in ("thinking", "answer"))
    return next(thinking, None), list(answers)


def parse(completion: str) -> ParsedReasoning:
    """Return a completion taken apart; any string is accepted, in time linear in its length.

    A centre is the marker `Camera Center:` or `Object Center:`, spaces, and on the same line either `null` or three
    numbers in square brackets (`parse_center`); markers are case-sensitive. Centres outside the thinking do not exist.
    """
    thinking, answers = find_blocks(completion)
    centers, malformed = _centers(thinking.text if thinking else "")
    return ParsedReasoning(
        thinking=thinking and thinking.text,
        answer=answers[-1].text if answers else None,
        answers_agree=len({block.text for block in answers}) <= 1,
        well_formed=_is_well_formed(completion[said(completion)]),
        camera_centers=tuple(centers["Camera"]),
        object_centers=tuple(centers["Object"]),
        malformed_cameras=malformed["Camera"],
        malformed_objects=malformed["Object"],
    )


def unread(completion: str, *, reasoning: bool) -> tuple[str, ...]:
    """Return in words what of a completion is not read, or is missing in it; () where all of it is read.

    Args:
      reasoning: whether thinking, answer and centres were asked for; without it only what was begun is looked at.
    """
    parsed, where = parse(completion), said(completion)
    spoken, found = completion[where], []
    if where.stop < len(completion):
        found.append("a thought (<think>) is never closed: nothing behind its opening counts")
    for name, text in (("thinking", parsed.thinking), ("answer", parsed.answer)):
        if text is None and f"<{name}>" in spoken:
            found.append(f"<{name}> is opened and never closed")
        elif text is None and reasoning:
            found.append(f"there is no <{name}> block")
    if not parsed.answers_agree:
        found.append("the <answer> blocks differ: the last one counts")
    if None not in (parsed.thinking, parsed.answer) and not parsed.well_formed:
        found.append("it is not one thinking block, one answer block behind it, and nothing else")
    kinds = (("camera", parsed.camera_centers, parsed.malformed_cameras),)
    kinds += (("object", parsed.object_centers, parsed.malformed_objects),)
    for kind, centers, malformed in kinds:
        if malformed:
            found.append(f"{malformed} of {malformed + len(centers)} {kind} centres are neither [x, y, z] nor null")
        elif reasoning and parsed.thinking is not None and not centers:
            found.append(f"no {kind} centre is written in the thinking")
    outside = len(_MARKER.findall(spoken)) - len(_MARKER.findall(parsed.thinking or ""))
    if outside:
        found.append(f"centres outside the thinking, where they do not count: {outside}")
    return tuple(found)


def parse_center(text: str) -> Vec3 | None:
    """`[x, y, z]` with nothing around it -> metres; None for anything else.

    Exactly three numbers (`parse_number`) with commas between them; spaces and tabs around numbers are allowed.
    """
    if len(text) > MAX_CENTER_CHARS or text[:1] != "[" or text[-1:] != "]":
        return None
    numbers = [parse_number(part.strip(" \t")) for part in text[1:-1].split(",")]
    if len(numbers) != 3 or None in numbers:
        return None
    return tuple(numbers)


def parse_number(text: str) -> float | None:
    """A decimal number in ASCII -> float; None for anything else.

    `1`, `-0.5`, `+.5`, `2.` and `1e-3` are numbers. NaN, infinities, hexadecimal, underscores, digits of other scripts,
    units, more than `MAX_NUMBER_CHARS` characters and magnitudes above `MAX_METRES` are not.
    """
    if len(text) > MAX_NUMBER_CHARS or not _NUMBER_CHARS.issuperset(text):
        return None
    try:
        value = float(text)  # of these characters it takes decimal numbers only
    except ValueError:
        return None
    return value if math.fabs(value) <= MAX_METRES else None


def _blocks(text: str, name: str, start: int) -> Iterator[Block]:
    """Yield the blocks that begin at `start` or later."""
    opening, closing = f"<{name}>", f"</{name}>"
    start = text.find(opening, start)
    while start >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            return
        yield Block(start, end + len(closing), text[start + len(opening) : end].strip())
        start = text.find(opening, end)


def _is_well_formed(text: str) -> bool:
    text = text.strip()
    if not (text.startswith("<thinking>") and text.endswith("</answer>")) or any(text.count(t) != 1 for t in _TAGS):
        return False
    return text.partition("</thinking>")[2].lstrip().startswith("<answer>")


def _centers(text: str) -> tuple[dict[str, list[Vec3 | None]], dict[str, int]]:
    """Centres of both kinds in order of writing, and how many of each kind are malformed."""
    centers: dict[str, list[Vec3 | None]] = {"Camera": [], "Object": []}
    malformed = {"Camera": 0, "Object": 0}
    for marker in _MARKER.finditer(text):
        kind, start = marker[1], marker.end()
        if len(centers[kind]) + malformed[kind] >= MAX_CENTERS:
            malformed[kind] += 1
            continue
        if _NULL.match(text, start):
            centers[kind].append(None)
            continue
        end = text.find("]", start, start + MAX_CENTER_CHARS) + 1  # 0: no closing bracket within reach
        center = parse_center(text[start:end])
        if center is None:
            malformed[kind] += 1
        else:
            centers[kind].append(center)
    return centers, malformed
