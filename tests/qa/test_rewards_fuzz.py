"""The reward on arbitrary text: it never raises, stays in [0, 1], and near-valid text gets what numpy computes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm4d_jax.qa.reasoning import MAX_CENTERS, parse_center, parse_number
from mllm4d_jax.qa.rewards import PRESETS, Solution, parse, score

TRUTH = Solution("A", ((0.0, 0.0, 0.0), (1.0, 2.0, 2.0)), (None, (1.0, 0.0, 5.0)))
KEYS = {"accuracy", "format", "camera", "object", "total", "tags", "centers", "length"}
PIECES = [
    "<thinking>",
    "</thinking>",
    "<answer>",
    "</answer>",
    "Camera Center:",
    "Object Center: ",
    "null",
    "[1, 2, 2]",
    "[0, 0, 0]",
    "[1, 0, 5]",
    "[nan, inf, 1e999]",
    "[[",
    "]]",
    "[",
    "]",
    ",",
    "A",
    "1e400",
    "9" * 50,
    "\n",
    " ",
    "\ud800",
    "\x00",
]


def check(text: str) -> None:
    for preset, weights in PRESETS.items():
        result = score(text, TRUTH, preset)
        assert result.keys() == KEYS
        assert all(type(v) is float and 0.0 <= v <= 1.0 for v in result.values()), result
        form = weights.tags * result["tags"] + weights.centers * result["centers"] + weights.length * result["length"]
        assert result["format"] == pytest.approx(form, abs=1e-12)


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(), max_size=300))  # all of Unicode, lone surrogates too
def test_any_text(text):
    check(text)
    check(f"<thinking>Camera Center: {text}</thinking>")
    check(f"<thinking>Object Center:[{text}]</thinking><answer>{text}</answer>")


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40))
def test_pieces_in_any_order(pieces):
    check("".join(pieces))


@settings(max_examples=400, deadline=None)
@given(st.text("0123456789+-.eE_ naifx\u0661\uff11", max_size=40) | st.floats().map(repr) | st.integers().map(str))
def test_a_number_is_what_python_reads_less_the_extras(text):
    found = parse_number(text)
    if found is not None:
        assert text.isascii() and found == float(text) and abs(found) <= 1e6
        return
    try:
        value = float(text)
    except ValueError:
        return
    extras = set(text) & set(" _naifx") or not text.isascii()
    assert extras or len(text) > 32 or abs(value) > 1e6


coordinates = st.floats(-1e6, 1e6).map(lambda x: round(x, 3)) | st.floats(-3, 3).map(lambda x: round(x, 2))
points = st.tuples(coordinates, coordinates, coordinates)
states = st.lists(st.none() | points, max_size=4).map(tuple)


def reference(written, truth) -> float:
    """The closeness rule, once more and in numpy."""
    if len(written) == len(truth) and [p is None for p in written] != [g is None for g in truth]:
        return 0.0
    p = np.array([p for p in written if p is not None]).reshape(-1, 3)
    g = np.array([g for g in truth if g is not None]).reshape(-1, 3)
    if len(p) != len(g):
        return 0.0
    return float(np.exp(-np.linalg.norm(p - g, axis=1).mean())) if len(p) else 1.0


@settings(max_examples=400, deadline=None)
@given(states, states, states, states, st.randoms(use_true_random=False), st.sampled_from("AB"), st.booleans())
def test_what_is_written_is_scored(cameras, objects, camera_truth, object_truth, rng, letter, near):
    if near:  # mostly the truth, else hardly any pair of lists would match
        cameras = tuple(g if g is None else tuple(x + rng.choice([0, 0.1]) for x in g) for g in camera_truth)
        objects = tuple(g if g is None else tuple(x + rng.choice([0, 0.1]) for x in g) for g in object_truth)
    lines = [f"- Camera Center: {'null' if c is None else list(c)}" for c in cameras]
    for i, line in enumerate(f"- Object Center: {'null' if c is None else list(c)}" for c in objects):
        lines.insert(2 * i + 1, line)
    text = f"<thinking>{chr(10).join(lines)}</thinking>\n<answer>{letter}</answer>"
    result = score(text, Solution("A", camera_truth, object_truth))
    beyond = [any(abs(x) > 1e6 for c in kind if c for x in c) for kind in (cameras, objects)]
    expected = [reference(cameras, camera_truth), reference(objects, object_truth)]
    expected = [0.0 if far else value for far, value in zip(beyond, expected, strict=True)]
    assert [result["camera"], result["object"]] == pytest.approx(expected, abs=1e-9)
    assert result["accuracy"] == float(letter == "A")


@settings(max_examples=200, deadline=None)
@given(points)
def test_a_printed_centre_reads_back(point):
    assert parse_center(str(list(point))) == point
    assert parse_center(f"[{point[0]:.3f},{point[1]:.3f},{point[2]:.3f}]") == pytest.approx(point, abs=1e-3)


@settings(max_examples=200, deadline=None)
@given(st.lists(points, min_size=2, max_size=2), st.lists(points, min_size=2, max_size=2), st.sampled_from("ABCD"))
def test_nothing_beats_the_gold_completion(cameras, objects, letter):
    solution = Solution(letter, tuple(cameras), tuple(objects))
    blocks = "\n".join(
        f"**Spatial State ({name} frame):**\n- Camera Center: {list(c)}\n- Object Center: {list(o)}"
        for name, c, o in zip(("start", "end"), cameras, objects, strict=True)
    )
    gold = f"<thinking>{blocks}</thinking><answer>{letter}</answer>"
    for preset, weights in PRESETS.items():
        assert score(gold, solution, preset)["total"] == pytest.approx(1.0, abs=1e-12)
        wrong = gold.replace(f"<answer>{letter}", "<answer>E")
        assert score(wrong, solution, preset)["total"] == pytest.approx(1 - weights.accuracy, abs=1e-12)


# Each would take minutes or the whole stack if the parser went over it again and again, or into it.
HOSTILE = {
    "open brackets": "[",
    "nested lists": "Camera Center: [",
    "markers": "Camera Center:",
    "spaces": " ",
    "nulls": "Object Center: null ",
    "open thoughts": "<thinking>",
    "open answers": "<answer>",
    "answers": "<answer>A</answer>",
    "closing tags": "</answer>",
    "thoughts": "<thinking></thinking>",
    "half tags": "<thinking",
    "digits": "9",
    "numbers": "1,",
    "exponents": "1e",
    "centres": "Camera Center: [1, 2, 2]",
    "wide characters": "\U0001f600",
}


@pytest.mark.parametrize("size", [1 << 16, 1 << 20])
@pytest.mark.parametrize("name", HOSTILE)
def test_long_hostile_text(name, size):
    piece = HOSTILE[name]
    text = piece * (size // len(piece))
    check(text)
    check(f"<thinking>Camera Center: [{text}")
    check(f"<thinking>Camera Center: {text}]</thinking><answer>{text}</answer>")


@pytest.mark.parametrize("seed", range(3))
def test_64_kib_of_pieces(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(PIECES) for _ in range(1 << 14))[: 1 << 16]
    check(text)
    check(f"<thinking>{text.replace('thinking', '')}</thinking><answer>A</answer>")


def test_work_after_a_marker_is_bounded():
    """A closing bracket out of reach is not searched for: the centre is malformed whatever comes later."""
    far = "[1, 2," + " " * 200 + "2]"
    assert parse_center(far) is None and parse_center(far.replace(" " * 150, "")) == (1.0, 2.0, 2.0)
    found = parse(f"<thinking>Camera Center: {far} Camera Center: {' ' * 9999}[1, 2, 2]</thinking>")
    assert (found.camera_centers, found.malformed_cameras) == (((1.0, 2.0, 2.0),), 1)
    assert math.isclose(score("<answer>A</answer>", TRUTH)["total"], 0.5)


def test_no_solution_has_that_many_states():
    line, other = "Camera Center: [0, 0, 0] ", "Object Center: null "
    at_most, beyond = (parse(f"<thinking>{line * n}{other}</thinking>") for n in (MAX_CENTERS, MAX_CENTERS + 7))
    assert (len(at_most.camera_centers), at_most.malformed_cameras) == (MAX_CENTERS, 0)
    assert (len(beyond.camera_centers), beyond.malformed_cameras) == (MAX_CENTERS, 7)
    assert (beyond.object_centers, beyond.malformed_objects) == ((None,), 0)
