"""Lines of completions and predictions as what is shown, whatever their fields hold."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm4d_jax.report.browser import BrowserOptions, browser, center_map, distances
from mllm4d_jax.report.items import Centers, ShownAnswer, completion_item, prediction_item
from tests.report.reading import read

COMPLETION = {
    "step": 7, "key": "r.jsonl#3", "question": "Which way?", "media": ["a.mp4"], "branch": 2, "completion": "left",
    "finish": "stop", "tokens": 9, "rewards": {"accuracy": 1.0, "x.y": 0.25, "odd": "no"}, "total": 0.75,
    "advantage": -0.5, "answer": "A", "solution": {"answer": "A", "camera_center": [[0, 0, 0], None, [3, 0, 4]],
    "object_center": None}, "camera": [[0, 0, 1], [9, 9, 9], [3, 0, 2]], "object": [None],
}  # fmt: skip


def test_a_completion():
    item = completion_item(COMPLETION)
    assert (item.title, item.outcome, item.media) == ("step 7, r.jsonl#3, branch 2", "correct", ("a.mp4",))
    assert item.scores == {"accuracy": 1.0, "x.y": 0.25, "total": 0.75, "advantage": -0.5}
    assert item.keys == {"step": 7.0, "tokens": 9.0, **item.scores}
    assert item.facets == {"outcome": "correct", "finish": "stop"}
    assert item.camera.truth == ((0, 0, 0), None, (3, 0, 4)) and item.objects.predicted == (None,)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"answer": "B"}, "wrong"),
        ({"answer": "A", "solution": {"answer": "A. left"}}, "correct"),
        ({"answer": "B", "solution": {"answer": "(A) left"}}, "wrong"),
        ({"answer": None}, "unparsed"),
        ({"answer": None, "solution": {}}, "unparsed"),
        ({"solution": {}}, "not judged"),
        ({"solution": "A"}, "not judged"),
    ],
)
def test_outcomes_of_completions(changes, outcome):
    assert completion_item(COMPLETION | changes).outcome == outcome


def test_a_prediction():
    row = {
        "id": "q",
        "letter": "B",
        "correct": False,
        "truth": ["A", "C"],
        "choices": {"B": 2, "A": "x"},
        "media": "v.mp4",
    }
    item = prediction_item(row | {"subtask": "s", "conflict": True})
    assert (item.title, item.outcome, item.answer, item.truth) == ("q", "wrong", "B", ("A", "C"))
    assert list(item.choices.items()) == [("A", "x"), ("B", "2")]
    assert item.facets == {"outcome": "wrong", "subtask": "s"}
    assert ("conflict", "several answers are given") in item.facts
    assert prediction_item({"answer": "left"}).truth == ("left",)


def test_an_answer_that_is_a_number():
    row = {"choices": {}, "truth": [], "answer": "4.5", "letter": None, "number": 0.0, "score": 0.6, "correct": False}
    item = prediction_item(row)
    assert (item.answer, item.truth, item.outcome, item.keys["score"]) == ("0.0", ("4.5",), "wrong", 0.6)
    assert prediction_item(row | {"number": None}).outcome == "unparsed"
    assert prediction_item(row | {"correct": True}).outcome == "correct"


def test_distances_are_between_states_that_both_have():
    assert distances(completion_item(COMPLETION).camera) == [1.0, 2.0]
    assert distances(Centers(((0, 0, 0),), ())) == []


def test_the_map_has_truth_and_what_was_said_from_above():
    made = read(center_map(completion_item(COMPLETION), "t"))
    assert [e.text for e in made.all("li")] == ["camera, true", "camera, said"]
    dashes = [e.attributes.get("stroke-dasharray") for e in made.all("path")]
    assert dashes[0] is None and dashes[1]
    looks = [e.classes for e in made.all("path")]
    assert "ink" in looks[0] and "ink" in looks[1]
    (x0, y0), (x1, y1) = (re.findall(r"[\d.]+", step) for step in re.findall(r"[ML][\d. ]+", _truth_path()))
    assert (float(y0) - float(y1)) / (float(x1) - float(x0)) == pytest.approx(5 / 3, abs=0.02)
    assert center_map(ShownAnswer("", "", (), {}, "", "wrong", "", ()), "t") is None


def _truth_path() -> str:
    """The drawn path of a camera that moved 3 m to the right, 2 m down and 5 m forward."""
    item = ShownAnswer("", "", (), {}, "", "wrong", "", (), camera=Centers(((0, 0, 0), (3, 2, 5))))
    return read(center_map(item, "t")).all("path")[0].attributes["d"]


def test_said_centres_alone_are_drawn_too():
    item = completion_item(COMPLETION | {"solution": {"answer": "A"}})
    assert [e.text for e in read(center_map(item, "t")).all("li")] == ["camera, said"]


def test_no_line_makes_the_page_long():
    many = {f"name {n}": 1.0 for n in range(5000)}
    far = [[n, n, n] for n in range(5000)]
    rows = [COMPLETION | {"rewards": many, "camera": far, "media": ["x"] * 5000}]
    entries = [{"": completion_item(row)} for row in rows] + [
        {"": prediction_item({"choices": many, "truth": [*many]})}
    ]
    assert len(browser(entries, BrowserOptions(frames=0), label="x")) < 40_000


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*COMPLETION, "id", "letter", "truth", "choices", "response", "correct", "video", "subtask", "rule"})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([f for f in FIELDS if f != "media"]), ANY))
def test_any_json_in_any_field_can_be_shown(row):
    row = json.loads(json.dumps(row))
    entries = [{"": completion_item(row)}, {"": prediction_item(row)}]
    read(browser(entries, BrowserOptions(frames=0), label="x")).text.encode("utf-8")
