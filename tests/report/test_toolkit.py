"""What run reports need of charts, maps and cards: areas, faint curves, shared colours, guesses, bounds."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from mllm4d_jax.report import page
from mllm4d_jax.report.charts import lines, number_text
from mllm4d_jax.report.maps import MapPath, top_map
from mllm4d_jax.report.page import Card, tag
from tests.report.reading import read

AXES = {"title": "t", "x_label": "x", "y_label": "y"}


def looks(element) -> list[tuple[set[str], str | None]]:
    return [(e.classes - {"line"}, e.attributes.get("stroke-dasharray")) for e in element.all("path")]


def test_areas_and_faint_curves_lie_behind_in_their_series_colour():
    x = [0, 1, 2]
    made = read(
        lines(
            {"a": (x, x), "b": (x, [1, 1, 1]), "a, again": (x, [2, 1, 0])},
            faint={"a": (x, [0, 2, 2])},
            bands={"b": (x, [0, 0, 0], [2, 2, 2])},
            like={"a, again": "a"},
            **AXES,
        )
    )
    found = looks(made)
    assert found[:2] == [({"s0", "faint"}, None), ({"band", "s1"}, None)]
    assert found[2:5] == [({"s0"}, None), ({"s1"}, None), ({"s0"}, "6 3")]
    assert [e.text for e in made.all("ul")[0].all("span")] == ["a", "b", "a, again"]


def test_an_area_is_between_its_edges_and_has_gaps():
    x = np.arange(6.0)
    low, high = np.zeros(6), np.array([1, 1, math.nan, 2, 2, 2])
    made = read(lines({"a": (x, low)}, bands={"a": (x, low, high)}, **AXES))
    areas = [e.attributes["d"] for e in made.all("path", "band")]
    assert len(areas) == 2 and all(d.startswith("M") and d.endswith("Z") for d in areas)
    corners = [np.array(re.findall(r"([\d.]+) ([\d.]+)", d), float) for d in areas]
    assert [len(c) for c in corners] == [4, 6]
    heights = [np.ptp(c[:, 1]) for c in corners]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.05)


def test_a_long_area_is_thinned():
    x = np.arange(50_000.0)
    made = lines({"a": (x, x)}, bands={"a": (x, x - 1, x + 1)}, faint={"a": (x, x)}, **AXES)
    assert len(made) < 80_000


def test_names_that_are_no_series_are_refused():
    for changes in ({"faint": {"b": ([], [])}}, {"bands": {"b": ([], [], [])}}, {"like": {"a": "b"}}):
        with pytest.raises(ValueError, match="'b' is none of its series"):
            lines({"a": ([0], [0])}, **changes, **AXES)


@pytest.mark.parametrize("value", [1e-6, 0.4, 0.0, -3.0, 1e9])
def test_a_level_curve_has_an_axis_of_its_own_size(value):
    x = np.arange(50.0)
    noisy = value * (1 + 1e-15 * (x % 3))
    made = read(lines({"a": (x, noisy)}, **AXES))
    words = [e.text for e in made.all("text") if e.attributes.get("text-anchor") == "end" and e.text != "x"]
    marks = [float(word.replace(",", "")) for word in words]
    assert len(set(marks)) >= 2 and all(abs(mark - value) <= 0.06 * (abs(value) or 1) for mark in marks)
    ys = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", made.all("path")[0].attributes["d"])]
    assert max(ys) - min(ys) < 0.01


def test_small_steps_are_told_apart():
    assert [number_text(v, 5e-8) for v in (9.5e-7, 1e-6, 1.05e-6, 0.0)] == ["9.5e-7", "1e-6", "1.05e-6", "0"]
    assert number_text(-2e-5, 1e-5) == "-2e-5"


def test_large_numbers_are_short():
    assert [number_text(v, 5e5) for v in (-5e5, 0.0, 1e6, 1.5e6)] == ["-5e5", "0", "1e6", "1.5e6"]
    assert number_text(60_000, 20_000) == "60,000"


def test_a_guess_is_dashed_in_the_look_of_the_path_before():
    points = np.array([[0.0, 0.0], [1.0, 1.0]])
    paths = [
        MapPath("c", points, camera=True),
        MapPath("c2", points + 1, camera=True, guess=True),
        MapPath("o", points),
        MapPath("o2", points + 1, guess=True),
        MapPath("p", points),
    ]
    made = read(top_map(paths, title="t", x_label="x", y_label="y"))
    names = [
        (next(iter(li.classes)), li.text, li.all("line")[0].attributes.get("stroke-dasharray")) for li in made.all("li")
    ]
    assert [(look, name) for look, name, _ in names] == [
        ("ink", "c"),
        ("ink", "c2"),
        ("s0", "o"),
        ("s0", "o2"),
        ("s1", "p"),
    ]
    assert [bool(pattern) for *_, pattern in names] == [False, True, False, True, False]
    with pytest.raises(ValueError, match="no path comes before"):
        top_map([paths[1]], title="t", x_label="x", y_label="y")


def test_cards_say_what_can_be_bounded():
    cards = [Card("a", tag("p", "x"), {}, {"step": 1.0})]
    made = read(page.cards(cards, label="l", ranges=("step",), wide=True)).all("div")[0]
    assert json.loads(made.attributes["data-ranges"]) == ["step"] and "wide" in made.classes
    plain = read(page.cards(cards, label="l")).all("div")[0]
    assert "data-ranges" not in plain.attributes and "wide" not in plain.classes
