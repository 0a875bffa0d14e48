"""The reward on a table of completions whose components and totals were worked out by hand, for both presets.

paper   = .5 accuracy + .1 tags + .1 centers + .15 camera + .15 object
release = .6 accuracy + .1 tags + .08 centers + .02 length + .1 camera + .1 object
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from mllm4d_jax.qa.rewards import (
    PRESETS,
    RewardWeights,
    Solution,
    SolutionError,
    parse,
    resolve_weights,
    score,
)

# Camera 3 m apart, object 1 m apart.
MOVING = Solution("B", ((0.0, 0.0, 0.0), (1.0, 2.0, 2.0)), ((1.0, 0.0, 4.0), (1.0, 0.0, 5.0)))
NO_OBJECT = dataclasses.replace(MOVING, object_center=(None, None))
LATE_OBJECT = dataclasses.replace(MOVING, object_center=(None, (1.0, 0.0, 5.0)))
NO_CENTERS = Solution("B", (None, None), ())
CAMERAS, OBJECTS = ("[0, 0, 0]", "[1, 2, 2]"), ("[1, 0, 4]", "[1, 0, 5]")
LONG = "The camera moves to the right."


def states(cameras=CAMERAS, objects=OBJECTS) -> str:
    """One line per centre; the states are told apart by their order only."""
    lines = ["**Spatial State (start frame):**", *(f"- Camera Center: {c}" for c in cameras)]
    return "\n".join([*lines, *(f"- Object Center: {o}" for o in objects)])


def reply(answer="B", cameras=CAMERAS, objects=OBJECTS) -> str:
    return f"<thinking>{LONG}\n{states(cameras, objects)}\n</thinking><answer>{answer}</answer>"


def camera(first: str, second: str = "[1, 2, 2]") -> str:
    return reply(cameras=(first, second))


# name: (completion, solution, accuracy, tags, centers in paper, in release, length, camera, object, paper, release)
CASES = {
    # the answer
    "gold": (reply(), MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "wrong letter": (reply("C"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "small letter": (reply("b"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "full stop": (reply("B."), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "brackets": (reply("(B)"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "letter and text": (reply("B. left"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "letter twice": (reply("B B"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "empty answer": (reply(""), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "cyrillic letter": (reply("\u0412"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "full-width letter": (reply("\uff22"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "zero-width space": (reply("B\u200b"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "white space around": (reply(" \n B\t"), MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "same answer twice": (reply() + "<answer>B </answer>", MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "right, then wrong": (reply() + "<answer>C</answer>", MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "wrong, then right": (reply("C") + "<answer>B</answer>", MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "all letters": ("".join(f"<answer>{x}</answer>" for x in "ABCD"), MOVING, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0),
    "nested answer": (reply("<answer>B</answer>"), MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    "answer open": (reply().removesuffix("</answer>"), MOVING, 0, 0, 1, 1, 1, 1, 1, 0.4, 0.3),
    "answer in capitals": (reply().replace("answer>", "ANSWER>"), MOVING, 0, 0, 1, 1, 1, 1, 1, 0.4, 0.3),
    "spaced tag": (reply().replace("<answer>", "< answer>"), MOVING, 0, 0, 1, 1, 1, 1, 1, 0.4, 0.3),
    "same answer in thinking": (
        reply().replace(LONG, "I take <answer>B</answer>, it fits."),
        *(MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    ),
    "other answer in thinking": (
        reply().replace(LONG, "Not <answer>C</answer>, too far."),
        *(MOVING, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.4),
    ),
    # the form
    "nothing": ("", MOVING, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0),
    "letter only": ("B", MOVING, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0),
    "answer only": ("<answer>B</answer>", MOVING, 1, 0, 0, 0, 0, 0, 0, 0.5, 0.6),
    "empty thinking": ("<thinking></thinking><answer>B</answer>", MOVING, 1, 1, 0, 0, 0, 0, 0, 0.6, 0.7),
    "20 characters": (f"<thinking>{'x' * 20}</thinking><answer>B</answer>", MOVING, 1, 1, 0, 0, 0, 0, 0, 0.6, 0.7),
    "20 and spaces": (f"<thinking>{'x' * 20}  \n</thinking><answer>B</answer>", MOVING, 1, 1, 0, 0, 0, 0, 0, 0.6, 0.7),
    "21 characters": (f"<thinking>{'x' * 21}</thinking><answer>B</answer>", MOVING, 1, 1, 0, 0, 1, 0, 0, 0.6, 0.72),
    "answer first": (f"<answer>B</answer><thinking>{states()}</thinking>", MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "text around": (f"Sure. {reply()} Done.", MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "centres without thinking": (f"{states()}<answer>B</answer>", MOVING, 1, 0, 0, 0, 0, 0, 0, 0.5, 0.6),
    "thinking open": (reply().replace("</thinking>", ""), MOVING, 1, 0, 0, 0, 0, 0, 0, 0.5, 0.6),
    "thinking closed first": (
        f"</thinking>{states()}<thinking><answer>B</answer>",
        MOVING,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        0.5,
        0.6,
    ),
    "other tag": (reply().replace("thinking", "think"), MOVING, 1, 0, 0, 0, 0, 0, 0, 0.5, 0.6),
    "centres after": (
        f"<thinking>{LONG}</thinking><answer>B</answer>{states()}",
        *(MOVING, 1, 1, 0, 0, 1, 0, 0, 0.6, 0.72),
    ),
    "centres before": (
        f"{states()}<thinking>{LONG}</thinking><answer>B</answer>",
        *(MOVING, 1, 1, 0, 0, 1, 0, 0, 0.6, 0.72),
    ),
    "second thinking": (f"<thinking>so</thinking>{reply()}", MOVING, 1, 1, 0, 0, 0, 0, 0, 0.6, 0.7),
    "nested thinking": (f"<thinking>{reply()}</thinking>", MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "one line": (reply().replace("\n", " "), MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "windows lines": (reply().replace("\n", "\r\n"), MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "small markers": (reply().replace("Center", "center"), MOVING, 1, 1, 0, 0, 1, 0, 0, 0.6, 0.72),
    # distances: exp(-.1) = .904837, exp(-.5) = .606531, exp(-1.5) = .223130, exp(-3) = .049787, exp(-1) = .367879
    "both .1 m off": (camera("[.1, 0, 0]", "[1, 2.1, 2]"), MOVING, 1, 1, 1, 1, 1, 0.904837, 1, 0.985726, 0.990484),
    "one 1 m off": (camera("[0, 0, -1]"), MOVING, 1, 1, 1, 1, 1, 0.606531, 1, 0.940980, 0.960653),
    "camera stands still": (camera("[1, 2, 2]"), MOVING, 1, 1, 1, 1, 1, 0.223130, 1, 0.883470, 0.922313),
    "states swapped": (camera("[1, 2, 2]", "[0, 0, 0]"), MOVING, 1, 1, 1, 1, 1, 0.049787, 1, 0.857468, 0.904979),
    "object swapped": (reply(objects=OBJECTS[::-1]), MOVING, 1, 1, 1, 1, 1, 1, 0.367879, 0.905182, 0.936788),
    "kinds swapped": (  # camera 1 - (0,0,0): 4.123106 and (1,0,5) - (1,2,2): 3.605551; exp(-3.864328) = .020977
        reply(cameras=OBJECTS, objects=CAMERAS),
        *(MOVING, 1, 1, 1, 1, 1, 0.020977, 0.020977, 0.706293, 0.804195),
    ),
    "very far": (camera("[1e6, 0, 0]"), MOVING, 1, 1, 1, 1, 1, 0, 1, 0.85, 0.9),
    # how many
    "one camera": (reply(cameras=CAMERAS[:1]), MOVING, 1, 1, 1, 1, 1, 0, 1, 0.85, 0.9),
    "three cameras": (reply(cameras=(*CAMERAS, "[1, 2, 2]")), MOVING, 1, 1, 1, 1, 1, 0, 1, 0.85, 0.9),
    "no camera": (reply(cameras=()), MOVING, 1, 1, 0, 0, 1, 0, 1, 0.75, 0.82),
    "no object": (reply(objects=()), MOVING, 1, 1, 0, 0, 1, 1, 0, 0.75, 0.82),
    "one object": (reply(objects=OBJECTS[1:]), MOVING, 1, 1, 1, 1, 1, 1, 0, 0.85, 0.9),
    "no centres": (reply(cameras=(), objects=()), MOVING, 1, 1, 0, 0, 1, 0, 0, 0.6, 0.72),
    # null
    "camera null": (camera("null", "null"), MOVING, 1, 1, 0, 0, 1, 0, 1, 0.75, 0.82),
    "camera null once": (camera("null"), MOVING, 1, 1, 1, 1, 1, 0, 1, 0.85, 0.9),
    "camera null extra": (reply(cameras=("null", *CAMERAS)), MOVING, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "right null": (reply(objects=("null", "null")), NO_OBJECT, 1, 1, 1, 0, 1, 1, 1, 1.0, 0.92),
    "right null, once": (reply(objects=("null",)), NO_OBJECT, 1, 1, 1, 0, 1, 1, 1, 1.0, 0.92),
    "null with full stop": (reply(objects=("null.", "null")), NO_OBJECT, 1, 1, 1, 0, 1, 1, 1, 1.0, 0.92),
    "nothing said": (reply(objects=()), NO_OBJECT, 1, 1, 0, 0, 1, 1, 1, 0.9, 0.92),
    "object made up": (reply(), NO_OBJECT, 1, 1, 1, 1, 1, 1, 0, 0.85, 0.9),
    "half made up": (reply(objects=("null", "[1, 0, 5]")), NO_OBJECT, 1, 1, 1, 1, 1, 1, 0, 0.85, 0.9),
    "null and malformed": (reply(objects=("null", "[nan, 0, 5]")), NO_OBJECT, 1, 1, 0, 0, 1, 1, 0, 0.75, 0.82),
    "null, then value": (reply(objects=("null", "[1, 0, 5]")), LATE_OBJECT, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "value, no null": (reply(objects=("[1, 0, 5]",)), LATE_OBJECT, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0),
    "value, then null": (reply(objects=("[1, 0, 5]", "null")), LATE_OBJECT, 1, 1, 1, 1, 1, 1, 0, 0.85, 0.9),
    "two nulls for one": (reply(objects=("null", "null")), LATE_OBJECT, 1, 1, 0, 0, 1, 1, 0, 0.75, 0.82),
    "two values for one": (reply(), LATE_OBJECT, 1, 1, 1, 1, 1, 1, 0, 0.85, 0.9),
    "all null": (reply(cameras=("null",) * 2, objects=("null",)), NO_CENTERS, 1, 1, 1, 0, 1, 1, 1, 1.0, 0.92),
    "nothing to say": (reply(cameras=(), objects=()), NO_CENTERS, 1, 1, 0, 0, 1, 1, 1, 0.9, 0.92),
    "nothing at all": ("", NO_CENTERS, 0, 0, 0, 0, 0, 1, 1, 0.3, 0.2),
}
assert len(CASES) >= 60

MALFORMED = [
    "[nan, 0, 0]",
    "[NaN, 0, 0]",
    "[inf, 0, 0]",
    "[0, -Infinity, 0]",
    "[1e999, 0, 0]",
    "[-1e999, 0, 0]",
    "[1e7, 0, 0]",
    f"[{'9' * 400}, 0, 0]",
    f"[0.{'0' * 31}, 0, 0]",
    "[]",
    "[0]",
    "[0, 0]",
    "[0, 0, 0, 0]",
    "[0, 0, 0,]",
    "[0, , 0]",
    "[0 0 0]",
    "[0; 0; 0]",
    "[0, 0 0]",
    "[[0, 0, 0]]",
    "[[0], 0, 0]",
    "[" * 500 + "0, 0, 0" + "]" * 500,
    "(0, 0, 0)",
    "0, 0, 0",
    "[0, 0, 0",
    "[0, 0,\n0]",
    "\n[0, 0, 0]",
    "[0x0, 0, 0]",
    "[0_0, 0, 0]",
    "[0j, 0, 0]",
    "[1-1, 0, 0]",
    "[--0, 0, 0]",
    "[0.0.0, 0, 0]",
    "[e0, 0, 0]",
    "[., 0, 0]",
    "[-, 0, 0]",
    "[False, 0, 0]",
    "['0', 0, 0]",
    "[0 m, 0, 0]",
    "[null, 0, 0]",
    "[x, y, z]",
    "[\u0660, 0, 0]",
    "[\uff10, 0, 0]",
    "[\u22120, 0, 0]",
    "[0\u00a0, 0, 0]",
    "[0\uff0c 0, 0]",
    f"[0, 0, {' ' * 200}0]",
    "None",
    "NULL",
    "nullable",
    "null0",
    "nul",
    "",
    "unknown",
    "__import__('os').getcwd()",
]
SPELLINGS = [
    "[0,0,0]",
    "[ 0 ,\t0 , 0 ]",
    "   \t [0, 0, 0]",
    "[+0, -0.0, .0]",
    "[0., 0e0, 0E+5]",
    "[0.000, 00, 0e-9]",
    "[1e-999, 0, 0]",
    "[0, 0, 0] metres",
    "[0, 0, 0], as before",
]


def check(result: dict[str, float], expected: dict[str, float]) -> None:
    assert result == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    text, solution, accuracy, tags, centers, centers_release, length, near, near_object, paper, release = CASES[name]
    parts = {"accuracy": accuracy, "tags": tags, "length": length, "camera": near, "object": near_object}
    form = {"centers": centers, "format": 0.5 * tags + 0.5 * centers}
    check(score(text, solution), parts | form | {"total": paper})
    form = {"centers": centers_release, "format": 0.5 * tags + 0.4 * centers_release + 0.1 * length}
    check(score(text, solution, "release"), parts | form | {"total": release})


@pytest.mark.parametrize("written", MALFORMED)
def test_a_malformed_centre_costs_its_own_kind_only(written):
    for text, zero in ((camera(written), "camera"), (reply(objects=("[1, 0, 4]", written)), "object")):
        for preset, total in (("paper", 0.75), ("release", 0.82)):
            result = score(text, MOVING, preset)
            other = {"camera": "object", "object": "camera"}[zero]
            assert (result[zero], result[other], result["centers"], result["accuracy"]) == (0, 1, 0, 1)
            assert result["total"] == pytest.approx(total)
    assert (parse(camera(written)).malformed_cameras, parse(camera(written)).malformed_objects) == (1, 0)


@pytest.mark.parametrize("written", SPELLINGS)
def test_other_spellings_of_the_same_numbers(written):
    for preset in PRESETS:
        assert score(camera(written), MOVING, preset)["total"] == pytest.approx(1.0)


def test_what_parse_finds():
    found = parse(" " + reply(cameras=("null", "[1.5, -2, 3e-1]"), objects=("[1, 2]",)) + "\n")
    assert found.camera_centers == (None, (1.5, -2.0, 0.3)) and found.object_centers == ()
    assert (found.malformed_cameras, found.malformed_objects) == (0, 1)
    assert found.thinking.startswith(LONG) and found.answer == "B"
    assert found.well_formed and found.answers_agree
    two = parse("<answer> A</answer><answer>B </answer>")
    assert (two.answer, two.answers_agree, two.thinking) == ("B", False, None)
    empty = parse("")
    assert (empty.thinking, empty.answer, empty.well_formed, empty.answers_agree) == (None, None, False, True)


def test_the_thought_of_a_thinking_model_earns_and_costs_nothing():
    said = "<thinking>Camera Center: [0, 0, 0]</thinking><answer>A</answer>"
    tried = "The form is <thinking>Camera Center: [9, 9, 9]</thinking><answer>letter</answer>. <answer>B</answer>"
    assert parse(f"<think>{tried}</think>\n{said}") == parse(said)
    assert parse(f"{tried}</think>{said}") == parse(said)
    assert parse(f"<think>{said}").answer is None


@pytest.mark.parametrize("far", [1.7e308, -1.7e308, 1.1e6, 10**400])
def test_a_centre_that_is_nowhere_in_a_video_is_no_solution(far):
    for centers in ([[far, 0, 0]], [far, 0, 0], [None, [0, 0, far]]):
        with pytest.raises(SolutionError, match="three finite numbers of metres|one entry per state"):
            Solution.from_record({"answer": "A", "camera_center": centers})


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        (reply(), True),
        (f"\n{reply()} ", True),
        (reply().replace("</thinking><", "</thinking>\n<"), True),
        (reply() + ".", False),
        ("So: " + reply(), False),
        (reply().replace("</thinking><", "</thinking>-<"), False),
        (reply() + "<answer>B</answer>", False),
        (reply() + "</answer>", False),
        (f"<answer>B</answer><thinking>{LONG}</thinking>", False),
        (f"<thinking>{LONG}</thinking>", False),
    ],
)
def test_well_formed_and_strict_tags(text, well_formed):
    strict = dataclasses.replace(PRESETS["paper"], strict_tags=True)
    assert parse(text).well_formed == well_formed
    assert score(text, MOVING, strict)["tags"] == float(well_formed)


@pytest.mark.parametrize(
    "lines",
    [
        ("null", "null"),
        ("[1, 0, 4]", "[1, 0, 5]"),
        ("null", "[1, 0, 5]"),
        ("[1, 0, 5]",),
        ("[nan, 0, 0]",),
        (),
    ],
)
def test_in_release_null_is_still_the_best_for_an_unused_kind(lines):
    assert score(reply(objects=lines), NO_OBJECT, "release")["total"] <= 0.92 + 1e-12
    counting = dataclasses.replace(PRESETS["release"], null_counts=True)
    assert score(reply(objects=("null", "null")), NO_OBJECT, counting)["total"] == pytest.approx(1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_more_distance_never_pays(preset):
    totals = [score(camera(f"[{x / 10}, 0, 0]"), MOVING, preset)["total"] for x in range(60)]
    assert all(a > b for a, b in zip(totals, totals[1:], strict=False))
    weight = PRESETS[preset].camera
    for x, total in enumerate(totals):
        assert total == pytest.approx(1 - weight + weight * math.exp(-x / 20), abs=1e-12)


def test_weights_of_ones_own():
    accuracy_only = RewardWeights(accuracy=1, format=0, camera=0, object=0, tags=0.5, centers=0.5)
    assert score("<answer>B</answer>", MOVING, accuracy_only)["total"] == 1.0
    no_space_time = dataclasses.replace(PRESETS["paper"], camera=0.0, object=0.0)
    assert score(reply(), MOVING, no_space_time)["total"] == pytest.approx(0.7)
    patient = dataclasses.replace(PRESETS["release"], min_thinking_chars=10_000)
    assert score(reply(), MOVING, patient)["total"] == pytest.approx(0.98)
    for wrong in ({"camera": 0.5}, {"format": -0.1}, {"tags": math.nan}, {"length": 0.2}, {"accuracy": math.inf}):
        with pytest.raises(ValueError, match=f"reward weights .*{next(iter(wrong))}="):
            dataclasses.replace(PRESETS["paper"], **wrong)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="no reward preset 'papr' .*did you mean 'paper'"):
        resolve_weights("papr")


def test_data_preparation_can_use_it_without_jax():
    code = "import sys, mllm4d_jax.qa.rewards as r; print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
