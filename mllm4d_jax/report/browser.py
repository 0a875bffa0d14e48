"""The part of the page in which single answers are looked at: one card each, with pictures, text, scores and a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm4d_jax.report import centers, page
from mllm4d_jax.report.items import TONES, ShownAnswer
from mllm4d_jax.report.page import Card, Markup, tag
from mllm4d_jax.report.pictures import PictureRule, Pictures, read_pictures
from mllm4d_jax.report.said import said, shortened

# Of the page's 10 MB. A picture in the page takes 4/3 of its bytes.
PICTURE_BYTES, TEXT_BYTES = 4_000_000, 2_400_000
_PICTURE, _TEXT = 14_000, 24_000  # at most for one picture, and for one completion
_FIELD = 400  # bytes of a title, an option or a fact
_SHOWN_FILES = 4  # clips of one question

Entry = Mapping[str, ShownAnswer]  # run -> what it answered to one question; the run is '' where there is only one


@dataclass(frozen=True)
class BrowserOptions:
    """What is shown of the answers.

    Attributes:
      answers: completions, and predictions, at most; more are sampled evenly.
      frames: of a clip; 0 shows none and opens no video.
      clip_s: seconds that a clip may take to decode.
      pictures_s: seconds after which no further clip is begun.
    """

    answers: int = 200
    frames: int = 4
    clip_s: float = 20.0
    pictures_s: float = 120.0


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` numbers from 0, evenly spaced, both ends included."""
    if count <= limit:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, limit).round().astype(int)).tolist()


def browser(entries: Sequence[Entry], options: BrowserOptions, *, label: str) -> Markup:
    """A card for each entry, in order."""
    paths = [path for entry in entries for path in _media(entry)] if options.frames else []
    size = min(_PICTURE, PICTURE_BYTES // max(options.frames * len(paths), 1))
    pictures = read_pictures(paths, PictureRule(options.frames, size, options.clip_s, options.pictures_s))
    text = min(_TEXT, TEXT_BYTES // max(sum(map(len, entries)), 1))
    cards = [_card(entry, pictures, text) for entry in entries]
    return page.cards(cards, label=label, ranges=("step",), wide=True)


def _media(entry: Entry) -> tuple[str, ...]:
    return next(iter(entry.values())).media[:_SHOWN_FILES]


def _card(entry: Entry, pictures: Mapping[str, Pictures], max_text: int) -> Card:
    item = next(iter(entry.values()))
    left = [
        *(strip(pictures[path], path) for path in _media(entry) if path in pictures),
        tag("p", shortened(item.question, max_text // 4), class_="question", tabindex="0"),
        _options(item, entry) if item.choices else None,
        *(centers.center_map(one, _called("Centres from above", name)) for name, one in entry.items()),
    ]
    right = [part for name, one in entry.items() for part in _answer(name, one, max_text)]
    body = tag("div", tag("div", *left, class_="stack"), tag("div", *right, class_="stack"), class_="review")
    outcome = "; ".join(_called(one.outcome, name) for name, one in entry.items())
    facets = {**item.facets, "outcome": outcome}
    tone = TONES[item.outcome] if len(entry) == 1 else ""
    return Card(item.title[:_FIELD], body, {name: value[:_FIELD] for name, value in facets.items()}, item.keys, tone)


def _answer(name: str, item: ShownAnswer, max_text: int) -> list[Markup | None]:
    """What one run answered, and what came of it."""
    return [
        tag("h4", name) if name else None,
        verdict(item),
        _scores(item.scores) if item.scores else None,
        said(item.response, max_text),
        facts([*item.facts, *centers.facts(item)]),
    ]


def _called(what: str, name: str) -> str:
    return f"{name}: {what}" if name else what


def strip(pictures: Pictures, path: str) -> Markup:
    """The frames of a clip side by side, or why there are none."""
    if not pictures.frames:
        return tag("div", tag("div", shortened(pictures.note, _FIELD), class_="missing"), class_="strip")
    name = shortened(path.rpartition("/")[2], _FIELD)
    shown = [
        tag("figure", page.image(jpeg, f"{name}, {caption}"), tag("figcaption", caption))
        for jpeg, caption in pictures.frames
    ]
    return tag("div", *shown, class_="strip", title=name)


def verdict(item: ShownAnswer) -> Markup:
    """The outcome, what was extracted, and what is right."""
    extracted = tag("b", shortened(item.answer, _FIELD)) if item.answer else "nothing"
    truth = shortened(", ".join(item.truth), _FIELD) if item.truth else "not known"
    mark = tag("span", item.outcome, class_=" ".join(filter(None, ("mark", TONES[item.outcome]))))
    return tag("p", mark, " extracted: ", extracted, "; right: ", tag("b", truth))


def facts(pairs: Sequence[tuple[str, str]]) -> Markup | None:
    """A list of names and values; None for none."""
    if not pairs:
        return None
    parts = [part for name, value in pairs for part in (tag("dt", name), tag("dd", shortened(value, _FIELD)))]
    return tag("dl", *parts, class_="facts")


def _scores(scores: Mapping[str, float]) -> Markup:
    shown = [tag("li", shortened(name, _FIELD), " ", tag("b", f"{value:.3g}")) for name, value in scores.items()]
    return tag("ul", *shown, class_="scores")


def _options(item: ShownAnswer, entry: Entry) -> Markup:
    lines = []
    for letter, text in item.choices.items():
        right = letter in item.truth
        answered = [name for name, one in entry.items() if one.answer == letter]
        notes = " ✓" * right + (f" ← {', '.join(filter(None, answered)) or 'answered'}" if answered else "")
        look = "good" if right else "bad" if answered else None
        lines.append(tag("li", shortened(f"{letter}. {text}", _FIELD), notes or None, class_=look))
    return tag("ul", *lines, class_="options")


def overview(items: Sequence[ShownAnswer]) -> str:
    """How many of the shown items came out how."""
    counts = {outcome: sum(item.outcome == outcome for item in items) for outcome in TONES}
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
