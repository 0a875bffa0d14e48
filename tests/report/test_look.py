"""The page of answers about a clip: frames, verdicts, what was not read, and maps from two sides in one scale."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mllm4d_jax import __version__
from mllm4d_jax.qa.rewards import Solution
from mllm4d_jax.report.look import film, look_page, shown_answer
from tests.report.reading import assert_nothing_external, read

CHOICES = {"A": "left", "B": "right"}
SOLUTION = Solution("A", ((0.0, 0.0, 0.0), (3.0, -2.0, 5.0)), (None, (1.0, 1.0, 1.0)))
SAID = (
    "<thinking>- Camera Center: [0, 0, 0]\n- Object Center: null\n- Camera Center: [1, 2]\n- Object Center: [1, 1, 2]"
    "</thinking><answer>A</answer>"
)


def answer(response=SAID, choices=CHOICES, **values):
    return shown_answer("q", "Which way?", choices, response, **({"reasoning": True} | values))


def not_read(item):
    return [value for name, value in item.facts if name == "not read"]


@pytest.mark.parametrize(
    ("values", "outcome", "found"),
    [
        (dict(truth=("A",)), "correct", "A"),
        (dict(truth=("B",)), "wrong", "A"),
        (dict(response="no idea", truth=("B",)), "unparsed", ""),
        (dict(response="no idea"), "unparsed", ""),
        (dict(), "not judged", "A"),
        (dict(choices={}), "not judged", "A"),
        (dict(choices={}, response="a dog"), "not judged", ""),
        (dict(choices={}, response="a dog", truth=("A dog.",)), "not judged", ""),
        (dict(choices={}, truth=("A",), solution=SOLUTION), "correct", "A"),
    ],
)
def test_outcomes(values, outcome, found):
    item = answer(**values)
    assert (item.outcome, item.answer) == (outcome, found)


def test_what_cannot_be_read_is_said():
    item = answer(solution=SOLUTION, notes=("it ends early",))
    assert item.camera.predicted == ((0.0, 0.0, 0.0),) and item.objects.predicted == (None, (1.0, 1.0, 2.0))
    assert not_read(item) == [
        "it ends early",
        "1 of 2 camera centres are neither [x, y, z] nor null",
        "camera centres written: 1; the question has 2 states",
    ]
    assert not_read(answer("B. right")) == [
        "there is no <thinking> block",
        "there is no <answer> block",
    ]
    assert not_read(answer("no idea", reasoning=False)) == ["no option can be read from it"]
    assert not_read(answer("A. right", reasoning=False)) == ["it gives another option besides"]


def test_the_page_has_all_of_it_and_needs_nothing():
    rng = np.random.default_rng(0)
    frames = [(rng.integers(0, 256, (32, 48, 3), np.uint8), f"{n / 4:.2f} s") for n in range(3)]
    shown = [answer(truth=("A",), solution=SOLUTION), answer("<b>free</b>", {}, reasoning=False), answer()]
    html = look_page("Answers about <a.mp4>", film(frames), shown, {"model": "m"}, {"seed": 0})
    assert_nothing_external(html)
    root = read(html)
    assert [e.text for e in root.all("div", "film")[0].all("figcaption")] == ["0.00 s", "0.25 s", "0.50 s"]
    assert "All 3 frames as the model saw them (48 x 32 pixels)" in root.text and __version__ in root.text
    first, second, third = root.all("article")
    assert [e.classes for e in third.all("ul", "options")[0].all("li")] == [set(), set()]  # the truth is not known
    assert [e.text for e in first.all("li", "good")] == ["A. left ✓ ← answered"]
    assert "<b>free</b>" in second.text and "extracted" not in second.text
    assert "1 correct, 2 not judged" in root.text


def test_many_frames_are_thinned_out_and_counted():
    small = np.zeros((4, 4, 3), np.uint8)
    made, note = film([(small, f"{n}") for n in range(300)])
    captions = [int(e.text) for e in read(made).all("figcaption")]
    assert len(captions) == 128 and captions[0] == 0 and captions[-1] == 299
    assert note.startswith("128 of 300, evenly spaced: frames")


def test_both_maps_of_an_answer_have_one_scale():
    page = read(look_page("t", film([]), [answer(solution=SOLUTION)], {}, {}))
    above, side = page.all("figure", "chart")
    assert [f.all("figcaption")[0].text for f in (above, side)] == ["Centres from above", "Centres from the side"]

    def moved(figure):
        """The drawn step of the true camera, on the page right and up."""
        path = next(p for p in figure.all("path") if p.all("title")[0].text == "camera, true")
        (x0, y0), (x1, y1) = (map(float, xy) for xy in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attributes["d"]))
        return x1 - x0, y0 - y1

    right, forward = moved(above)
    along, up = moved(side)
    # It moves 3 m to the right, 2 m up (y points down) and 5 m forward.
    assert forward == pytest.approx(along, abs=0.02) and along > 50
    assert right == pytest.approx(forward * 3 / 5, abs=0.02) and up == pytest.approx(forward * 2 / 5, abs=0.02)
