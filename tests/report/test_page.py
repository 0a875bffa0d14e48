"""The page toolkit: escaping, structure, policy, colours that can be read, pictures that stay small."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re

import cv2
import numpy as np
import pytest

from mllm4d_jax.report import page
from mllm4d_jax.report.page import Card, Cell, Column, Markup, Section, number, tag
from tests.report.reading import assert_nothing_external, read

NASTY = "<script>alert('x')</script> & \"quoted\" </td></style> é ✓"


def make_page(text: str = NASTY) -> str:
    table = page.table(
        [Column(text, meaning=text), Column("n", numeric=True)],
        [[text, number(1234.5, 1)], [Cell(text, 2.0, "warn"), number(math.nan)]],
        caption=text,
        filter=True,
    )
    card = Card(text, tag("p", text, title=text), {text: text, "split": "train"}, {"value": 1.5, "none": math.nan})
    picture = page.image(page.thumbnail(np.zeros((8, 8, 3), np.uint8)), text)
    sections = [
        Section("one", text, table, text),
        Section("two", "Cards", page.cards([card, Card("b", picture)], label=text)),
    ]
    return page.page(text, sections, subtitle=text, tiles=[(text, text)])


def test_every_text_is_escaped_and_can_be_read_back():
    html = make_page()
    root = read(html)
    assert "<script>alert" not in html
    assert len(root.all("script")) == 1 and len(root.all("style")) == 1
    for element in [
        root.all("title")[0],
        root.all("h1")[0],
        root.all("h2")[0],
        root.all("caption")[0],
        root.all("dd")[0],
    ]:
        assert element.text == NASTY
    cell = root.all("tbody")[0].all("td")[0]
    assert cell.text == NASTY
    card = root.all("article")[0]
    assert json.loads(card.attributes["data-facets"])[NASTY] == NASTY
    assert json.loads(card.attributes["data-keys"]) == {"value": 1.5}  # what has no value is not sorted by
    assert card.all("p")[0].attributes["title"] == NASTY
    assert root.all("img")[0].attributes["alt"] == NASTY


@pytest.mark.parametrize("text", ["\ud800 half a pair", "nul \x00 and \x1b[31m", "\x85"])
def test_what_html_cannot_hold_is_replaced(text):
    html = make_page(text)
    html.encode("utf-8")
    assert "\ufffd" in read(html).all("h1")[0].text
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f]", html)


def test_nothing_is_loaded_and_only_the_pages_own_script_and_style_are_allowed():
    html = make_page()
    assert_nothing_external(html)
    root = read(html)
    policy = next(m for m in root.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.attributes["content"].split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(root.all(name)[0].text.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert not [e for e in root.all() if "style" in e.attributes], "the policy would ignore a style attribute"
    script = root.all("script")[0].text
    for word in ("fetch(", "XMLHttpRequest", "innerHTML", "eval(", "import(", "document.write"):
        assert word not in script


def test_the_page_is_complete_without_javascript():
    root = read(make_page())
    hidden = [e for e in root.all() if "hidden" in e.attributes]
    assert [e.attributes.get("id") for e in hidden] == ["theme"]  # the switch would do nothing
    assert not root.all("input") and not root.all("select")
    anchors = [a.attributes["href"][1:] for a in root.all("nav")[0].all("a")]
    assert anchors == [s.attributes["id"] for s in root.all("section")] == ["one", "two"]


def test_same_input_same_bytes():
    assert make_page() == make_page()


def test_cells_carry_what_they_are_sorted_by():
    table = read(
        page.table([Column("x", True)], [[number(0.25, 1, percent=True)], [number(math.nan)], ["a"]], caption="t")
    )
    cells = table.all("td")
    assert [c.text for c in cells] == ["25.0%", "–", "a"]
    assert [c.attributes.get("data-sort") for c in cells] == ["0.25", "", None]
    assert number(1234567.0).value == "1,234,567"


def test_tables_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="'t'.*2 cells for 1"):
        page.table([Column("x")], [[1, 2]], caption="t")
    with pytest.raises(ValueError, match="tone 'loud'"):
        page.table([Column("x")], [[Cell(1, tone="loud")]], caption="t")
    assert read(page.table([Column("x")], [], caption="t")).all("td")[0].text == "nothing"


@pytest.mark.parametrize("anchors", [["a", "a"], ["A b"], ['x"']])
def test_bad_anchors_are_refused(anchors):
    with pytest.raises(ValueError, match="anchor"):
        page.page("t", [Section(a, "s", Markup("")) for a in anchors])


def test_thumbnails_keep_within_side_and_bytes_even_for_noise():
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)
    for frame in (noise, noise.transpose(1, 0, 2)):
        data = page.thumbnail(frame, max_side=320, max_bytes=20_000)
        shape = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape
        assert len(data) <= 20_000 and max(shape) <= 320
        assert shape[0] / shape[1] == pytest.approx(frame.shape[0] / frame.shape[1], rel=0.03)


def test_thumbnails_keep_size_of_small_frames_and_colour():
    frame = np.zeros((40, 64, 3), np.uint8)
    frame[..., 0] = 200
    back = cv2.imdecode(np.frombuffer(page.thumbnail(frame), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert back.shape == frame.shape
    assert np.abs(back.astype(int) - frame).max() < 12
    for bad in (frame[..., 0], frame.astype(np.float32), frame[:0]):
        with pytest.raises(ValueError, match="thumbnail"):
            page.thumbnail(bad)


def style() -> str:
    return read(make_page("x")).all("style")[0].text


def themes() -> list[dict[str, str]]:
    """Colours by name of each block that defines them: light, dark by preference, dark by choice."""
    blocks = re.findall(r"\{[^{}]*--ground:[^{}]*\}", style())
    return [dict(re.findall(r"--([a-z0-9-]+):\s*(#[0-9a-f]{6})", block)) for block in blocks]


def test_every_colour_is_defined_in_every_theme():
    light, dark, chosen = themes()
    assert dark == chosen and light.keys() == dark.keys() and light != dark
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", style())) <= light.keys()


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two colours #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_can_be_told_from_their_ground_in_both_themes():
    for theme in themes():
        for text in ("ink", "soft", "accent"):
            assert min(contrast(theme[text], theme[g]) for g in ("ground", "surface")) >= 4.5, text
        for tone in page.TONES[1:]:
            assert contrast(theme[tone], theme[f"{tone}-ground"]) >= 4.5, tone
        for n in range(8):
            assert contrast(theme[f"s{n}"], theme["surface"]) >= 3.0, n
