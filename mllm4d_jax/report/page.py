"""One self-contained HTML page: nothing is loaded, everything is escaped, all of it is readable without JavaScript.

Text becomes HTML through `tag` alone, which escapes whatever is not `Markup` already. The page forbids itself, by
content security policy, any request and any script or style but its own, so data that slipped through could not run.
`page.css` holds both colour themes, `page.js` adds sorting, filtering, keys and the theme switch.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from mllm4d_jax.files.version import PROGRAM

TONES = ("", "good", "warn", "bad")
_VOID = frozenset({"br", "hr", "img", "input", "meta"})
_ANCHOR = re.compile(r"[a-z][a-z0-9-]*")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LONG = 1e15  # a number above this is written with a power of ten
_SHORT = 40  # characters that a table's cell keeps on one line
_QUALITIES = (85, 70, 55, 40)


class Markup(str):
    """HTML that goes into a page as it is. Only `tag`, `escape` and `join` make it from data."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """HTML of any value's text; `Markup` stays as it is. What UTF-8 or HTML cannot hold becomes U+FFFD."""
    if isinstance(value, Markup):
        return value
    whole = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in str(value))
    return Markup(html.escape(_CONTROL.sub("\ufffd", whole), quote=True))


def join(parts: Sequence[object]) -> Markup:
    """The parts one after the other, escaped; None is left out."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Names: `class_` is class, `data_x` is data-x. True = bare attribute; None and False = left out."""
    found = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        found.append(f" {attribute}" if value is True else f' {attribute}="{escape(value)}"')
    opening = f"<{name}{''.join(found)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def shortened(text: str, max_bytes: int) -> Markup:
    """The text as HTML of at most about `max_bytes` bytes: two thirds from its beginning, the rest from its end."""
    keep = min(len(text), max_bytes)  # every character takes a byte at least
    while True:
        head, tail = (text, "") if keep == len(text) else (text[: keep - keep // 3], text[len(text) - keep // 3 :])
        shown = escape(head), escape(tail)
        size = sum(len(part.encode("utf-8")) for part in shown)
        if size <= max_bytes or keep <= 16:
            break
        keep = max(16, min(keep - 1, keep * max_bytes // size))
    if keep == len(text):
        return shown[0]
    cut = tag("span", f" … {len(text) - keep:,} characters are left out here … ", class_="cut")
    return join([shown[0], cut, shown[1]])


def thumbnail(frame: np.ndarray, *, max_side: int = 320, max_bytes: int = 40_000) -> bytes:
    """JPEG file of a frame, made smaller until it fits.

    Args:
      frame: u8[H, W, 3] RGB.
      max_side: pixels; smaller frames keep their size.
      max_bytes: quality and then size are lowered until the file has no more.

    Raises:
      ValueError: not such an array.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
        raise ValueError(f"a thumbnail is made of a frame u8[H, W, 3], not {frame.dtype}{list(frame.shape)}")
    image = np.ascontiguousarray(frame[..., ::-1])
    factor = min(1.0, max_side / max(image.shape[:2]))
    while True:
        height, width = (max(1, round(n * factor)) for n in image.shape[:2])
        small = image if factor == 1.0 else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        for quality in _QUALITIES:
            ok, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])
            if not ok:
                raise ValueError(f"a frame of shape {list(frame.shape)} cannot be encoded as JPEG")
            if data.size <= max_bytes or height * width <= 64:
                return data.tobytes()
        factor *= 0.7


def image(jpeg: bytes, alt: str) -> Markup:
    """An <img> that carries its JPEG file."""
    return tag("img", src=f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}", alt=alt)


@dataclass(frozen=True)
class Column:
    """A table's column: its head, whether it is numbers (right-aligned, sorted by value), and what it means."""

    title: str
    numeric: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, what it is sorted by (None: what it shows), and its tone, one of `TONES`."""

    value: object
    sort: float | None = None
    tone: str = ""


def number(value: float, digits: int = 0, *, percent: bool = False, tone: str = "") -> Cell:
    """A numeric cell: thousands apart, `digits` after the point; NaN shows as a dash and is sorted last."""
    if math.isnan(value):
        return Cell("–", value, tone)
    form = ".3g" if abs(value) >= _LONG else f".{digits}%" if percent else f",.{digits}f"
    return Cell(format(value, form), value, tone)


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]], *, caption: str, filter: bool = False) -> Markup:
    """A table that the page's script makes sortable and, with `filter`, searchable.

    Args:
      columns: the heads.
      rows: each with a value or a `Cell` per column.
      caption: shown above; also what a screen reader says.

    Raises:
      ValueError: a row of another length than `columns`, or an unknown tone.
    """
    heads = [
        tag("th", c.title, scope="col", class_="number" if c.numeric else None, title=c.meaning or None)
        for c in columns
    ]
    body = []
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table {caption!r}: a row has {len(row)} cells for {len(columns)} columns: {row!r}")
        body.append(tag("tr", *(_cell(c, value) for c, value in zip(columns, row, strict=True))))
    if not rows:
        body.append(tag("tr", tag("td", "nothing", colspan=len(columns), class_="empty")))
    parts = (tag("caption", tag("span", caption)), tag("thead", tag("tr", *heads)), tag("tbody", *body))
    whole = tag("table", *parts, data_filter=filter and bool(rows), data_sortable=len(rows) > 1)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(column: Column, value: object) -> Markup:
    cell = value if isinstance(value, Cell) else Cell(value)
    kind = "number" if column.numeric else "short" if len(str(cell.value)) <= _SHORT else ""
    classes = " ".join(filter(None, (kind, _tone(cell.tone))))
    order = None if cell.sort is None else "" if math.isnan(cell.sort) else f"{cell.sort:.9g}"
    return tag("td", cell.value, class_=classes or None, data_sort=order)


def _tone(tone: str) -> str:
    if tone not in TONES:
        raise ValueError(f"unknown tone {tone!r}; there are {TONES}")
    return tone


@dataclass(frozen=True)
class Card:
    """One item of a browsable list."""

    title: str  # its heading
    body: Markup  # what it shows
    facets: Mapping[str, str] = field(default_factory=dict)  # name -> value; the reader can keep those with one value
    keys: Mapping[str, float] = field(default_factory=dict)  # name -> number; the reader can sort by them
    tone: str = ""  # one of `TONES`


def cards(items: Sequence[Card], *, label: str, ranges: Sequence[str] = (), wide: bool = False) -> Markup:
    """A list of cards with search, facets, sorting and keys.

    Args:
      label: names the list, also to a screen reader.
      ranges: keys of the cards that the reader can keep within bounds.
      wide: one card under the other, instead of as many beside each other as there is room for.
    """
    if not items:
        return tag("p", "Nothing to show.", class_="empty")
    made = []
    for card in items:
        facets = json.dumps(dict(card.facets), sort_keys=True) if card.facets else None
        keys = json.dumps({k: v for k, v in sorted(card.keys.items()) if math.isfinite(v)}) if card.keys else None
        look = {"class_": f"card {_tone(card.tone)}".rstrip(), "tabindex": "0"}
        made.append(tag("article", tag("h3", card.title), card.body, **look, data_facets=facets, data_keys=keys))
    looks = "cards wide" if wide else "cards"
    bounds = json.dumps(list(ranges)) if ranges else None
    return tag("div", *made, class_=looks, role="group", aria_label=label, data_ranges=bounds)


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor (lower case, digits, dashes), heading, an explanation under it, and its body."""

    anchor: str
    title: str
    body: Markup
    note: str = ""


def page(
    title: str, sections: Sequence[Section], *, subtitle: str = "", tiles: Sequence[tuple[str, object]] = ()
) -> str:
    """The whole document.

    Args:
      tiles: (what it is, figure) pairs shown large at the top.

    Raises:
      ValueError: an anchor that is malformed or there twice.
    """
    anchors = [section.anchor for section in sections]
    for anchor in anchors:
        if not _ANCHOR.fullmatch(anchor) or anchors.count(anchor) > 1:
            raise ValueError(f"section anchor {anchor!r} must be lower case letters, digits, dashes, and be there once")
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    links = [tag("a", section.title, href=f"#{section.anchor}") for section in sections]
    figures = [tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles]
    top = tag(
        "header",
        tag("div", tag("h1", title), tag("button", "Theme", type="button", id="theme", hidden=True), class_="title"),
        tag("p", subtitle, class_="note") if subtitle else None,
        tag("dl", *figures, class_="tiles") if figures else None,
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        top,
        tag("nav", *links, aria_label="Sections"),
        tag("main", *map(_section, sections), id="content"),
        tag("footer", tag("p", id="keys", class_="note"), tag("p", f"Made by {PROGRAM}.", class_="note")),
        tag("script", Markup(script)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def _section(section: Section) -> Markup:
    heading = f"{section.anchor}-title"
    return tag(
        "section",
        tag("h2", section.title, id=heading),
        tag("p", section.note, class_="note") if section.note else None,
        section.body,
        id=section.anchor,
        aria_labelledby=heading,
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
