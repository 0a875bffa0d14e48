"""The part of the page in which single answers are looked at: one card each, with pictures, text, scores and a map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mllm4d_jax.qa.reasoning import find_blocks
from mllm4d_jax.report import page
from mllm4d_jax.report.items import TONES, Centers, ShownAnswer, Vec3
from mllm4d_jax.report.maps import MapPath, common_scale, top_map
from mllm4d_jax.report.page import Card, Markup, shortened, tag
from mllm4d_jax.report.pictures import Pictures, read_pictures

# Of the page's 10 MB. A picture in the page takes 4/3 of its bytes.
PICTURE_BYTES, TEXT_BYTES = 4_000_000, 2_400_000
_PICTURE, _TEXT = 14_000, 24_000  # at most for one picture, and for one completion
_FIELD = 400  # bytes of a title, an option or a fact
_SHOWN_FILES = 4  # clips of one question
_LOOKS = {"thinking": "thought", "answer": "answer"}

MAP_NOTE = (
    "Maps are in metres and in the axes of the solution: x to the right, z, which is forward, up. Open circles are "
    "starts, filled ones ends; what the model said is dashed."
)
SIDE_NOTE = "Those from the side have the same scale, z to the right and -y, which is up, up."

Entry = Mapping[str, ShownAnswer]  # run -> what it answered to one question; the run is '' where there is only one


class View(NamedTuple):
    """A direction from which centres (x to the right, y down, z forward) are drawn: axes of the page, in metres."""

    name: str
    x_label: str
    y_label: str
    axes: tuple[int, int]
    signs: tuple[float, float]

    def places(self, states: Sequence[Vec3 | None]) -> np.ndarray:
        """f64[N, 2] (right, up on the page); NaN where a state has none."""
        found = np.array([(np.nan,) * 3 if state is None else state for state in states], np.float64).reshape(-1, 3)
        return found[:, self.axes] * self.signs


VIEWS = (
    View("from above", "x, m", "z, m", (0, 2), (1.0, 1.0)),
    View("from the side", "z, m", "up, m", (2, 1), (1.0, -1.0)),
)


@dataclass(frozen=True)
class BrowserOptions:
    """What is shown of the answers.

    Attributes:
      answers: completions, and predictions, at most; more are sampled evenly.
      frames: of a clip; 0 shows none and opens no video.
      clip_s: seconds that a clip may take to decode.
      pictures_s: seconds after which no further clip is begun.
      side: maps from the side beside those from above.
    """

    answers: int = 200
    frames: int = 4
    clip_s: float = 20.0
    pictures_s: float = 120.0
    side: bool = False


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` numbers from 0, evenly spaced, both ends included."""
    if count <= limit:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, limit).round().astype(int)).tolist()


def browser(entries: Sequence[Entry], options: BrowserOptions, *, label: str) -> Markup:
    """A card for each entry, in order."""
    paths = [path for entry in entries for path in _media(entry)] if options.frames else []
    size = min(_PICTURE, PICTURE_BYTES // max(options.frames * len(paths), 1))
    pictures = read_pictures(
        paths, frames=options.frames, max_bytes=size, clip_s=options.clip_s, total_s=options.pictures_s
    )
    text = min(_TEXT, TEXT_BYTES // max(sum(map(len, entries)), 1))
    views = VIEWS if options.side else VIEWS[:1]
    cards = [_card(entry, pictures, text, views) for entry in entries]
    return page.cards(cards, label=label, ranges=("step",), wide=True)


def _media(entry: Entry) -> tuple[str, ...]:
    return next(iter(entry.values())).media[:_SHOWN_FILES]


def _card(entry: Entry, pictures: Mapping[str, Pictures], max_text: int, views: Sequence[View]) -> Card:
    item = next(iter(entry.values()))
    left = [
        *(_strip(pictures[path], path) for path in _media(entry) if path in pictures),
        tag("p", shortened(item.question, max_text // 4), class_="question", tabindex="0"),
        _options(item, entry) if item.choices else None,
        *(made for name, one in entry.items() for made in center_maps(one, views, name)),
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
        _verdict(item),
        _scores(item.scores) if item.scores else None,
        said(item.response, max_text),
        _facts([*item.facts, *_center_facts(item)]),
    ]


def _called(what: str, name: str) -> str:
    return f"{name}: {what}" if name else what


def _strip(pictures: Pictures, path: str) -> Markup:
    """The frames of a clip side by side, or why there are none."""
    if not pictures.frames:
        return tag("div", tag("div", shortened(pictures.note, _FIELD), class_="missing"), class_="strip")
    name = shortened(path.rpartition("/")[2], _FIELD)
    shown = [
        tag("figure", page.image(jpeg, f"{name}, {caption}"), tag("figcaption", caption))
        for jpeg, caption in pictures.frames
    ]
    return tag("div", *shown, class_="strip", title=name)


def _verdict(item: ShownAnswer) -> Markup | None:
    """The outcome, what was extracted, and what is right; None for a free answer of which nothing is known."""
    extracted = tag("b", shortened(item.answer, _FIELD)) if item.answer else "nothing"
    truth = tag("b", shortened(", ".join(item.truth), _FIELD)) if item.truth else "not known"
    if item.outcome == "not judged" and not item.answer:
        return tag("p", "right: ", truth) if item.truth else None
    mark = tag("span", item.outcome, class_=f"mark {TONES[item.outcome]}".rstrip())
    return tag("p", mark, " extracted: ", extracted, "; right: ", truth)


def _facts(pairs: Sequence[tuple[str, str]]) -> Markup | None:
    """A list of names and values; None for none."""
    parts = [part for name, value in pairs for part in (tag("dt", name), tag("dd", shortened(value, _FIELD)))]
    return tag("dl", *parts, class_="facts") if parts else None


def _scores(scores: Mapping[str, float]) -> Markup:
    shown = [tag("li", shortened(name, _FIELD), " ", tag("b", f"{value:.3g}")) for name, value in scores.items()]
    return tag("ul", *shown, class_="scores")


def _options(item: ShownAnswer, entry: Entry) -> Markup:
    lines = []
    for letter, text in item.choices.items():
        right = letter in item.truth
        answered = [name for name, one in entry.items() if one.answer == letter]
        notes = " ✓" * right + (f" ← {', '.join(filter(None, answered)) or 'answered'}" if answered else "")
        look = "good" if right else "bad" if answered and item.truth else None
        lines.append(tag("li", shortened(f"{letter}. {text}", _FIELD), notes or None, class_=look))
    return tag("ul", *lines, class_="options")


def pieces(completion: str) -> list[tuple[str, str]]:
    """Return (kind, text) in order, together the whole text; kind is "thinking", "answer" or "".

    Marked are the blocks that the reward reads (`reasoning.find_blocks`), their tags included. An answer block inside
    the thinking is marked as the answer.
    """
    thinking, answers = find_blocks(completion)
    blocks = (("answer", answers[-1] if answers else None), ("thinking", thinking))
    spans = {kind: (block.start, block.end) for kind, block in blocks if block}
    edges = sorted({0, len(completion)}.union(*spans.values()))
    kinds = (next((kind for kind, (a, b) in spans.items() if a <= start < b), "") for start in edges)
    return [(kind, completion[a:b]) for kind, (a, b) in zip(kinds, itertools.pairwise(edges), strict=False)]


def said(completion: str, max_bytes: int) -> Markup:
    """The marked completion; an empty one says that it is."""
    if not completion:
        return tag("p", "The completion is empty.", class_="empty")
    shares = {"thinking": max_bytes * 3 // 5, "answer": max_bytes // 5, "": max_bytes // 10}
    parts = []
    for kind, text in (piece for piece in pieces(completion) if piece[1]):
        whole = max_bytes if len(completion) == len(text) else shares[kind]
        inner = shortened(text, whole)
        parts.append(tag("span", inner, class_=_LOOKS[kind], title=kind) if kind else inner)
    return tag("div", *parts, class_="said", tabindex="0", role="region", aria_label="completion")


def distances(centers: Centers) -> list[float]:
    """Metres between the predicted and the true centre of each state that has both."""
    both = zip(centers.truth, centers.predicted, strict=False)
    return [math.dist(a, b) for a, b in both if a is not None and b is not None]


def center_maps(item: ShownAnswer, views: Sequence[View], name: str) -> list[Markup]:
    """Maps of the true and the predicted centres in one scale; [] where none are known.

    `name`: of the run, for the titles; '' for one of its own.
    """
    scale = common_scale(*(_center_paths(item, view) for view in views))
    made = (center_map(item, _called(f"Centres {view.name}", name), view, scale) for view in views)
    return [one for one in made if one is not None]


def center_map(item: ShownAnswer, title: str, view: View = VIEWS[0], scale: float | None = None) -> Markup | None:
    """Map of the true and the predicted centres; None where neither are known. `scale`: see `top_map`."""
    paths = _center_paths(item, view)
    return top_map(paths, title=title, x_label=view.x_label, y_label=view.y_label, scale=scale) if paths else None


def _center_paths(item: ShownAnswer, view: View) -> list[MapPath]:
    paths = []
    for called, centers in (("camera", item.camera), ("object", item.objects)):
        camera, known = called == "camera", _known(centers.truth)
        if known:
            paths.append(MapPath(f"{called}, true", view.places(centers.truth), camera=camera))
        if _known(centers.predicted):
            paths.append(MapPath(f"{called}, said", view.places(centers.predicted), camera=camera, guess=known))
    return paths


def _center_facts(item: ShownAnswer) -> Iterator[tuple[str, str]]:
    """What is to be said of the centres: (name, text) pairs."""
    for called, centers in (("camera", item.camera), ("object", item.objects)):
        if _known(centers.truth):
            yield f"{called}, true", _states(centers.truth)
        if _known(centers.predicted) or (_known(centers.truth) and centers.predicted):
            yield f"{called}, said", _states(centers.predicted)
        if apart := distances(centers):
            yield f"{called}, apart", ", ".join(f"{d:.2f} m" for d in apart)


def _known(states: Sequence[Vec3 | None]) -> bool:
    return any(state is not None for state in states)


def _states(states: Sequence[Vec3 | None]) -> str:
    return " → ".join("none" if s is None else f"({', '.join(f'{v:.4g}' for v in s)})" for s in states)


def overview(items: Sequence[ShownAnswer]) -> str:
    """How many of the shown items came out how."""
    counts = {outcome: sum(item.outcome == outcome for item in items) for outcome in TONES}
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
