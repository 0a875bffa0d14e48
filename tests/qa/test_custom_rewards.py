"""Rewards by name and weight: sums, loading from a path, and errors that name the function."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest

from mllm4d_jax.qa.custom_rewards import RewardError, load_function, load_rewards
from mllm4d_jax.qa.rewards import Solution, SolutionError, score
from mllm4d_jax.run.loop import StopSignal

SOLUTION = {"answer": "A", "camera_center": [[0, 0, 0], [1, 0, 0]], "object_center": None}
TEXT = (
    "<thinking>It moves right.\n- Camera Center: [0, 0, 0]\n- Object Center: null\n- Camera Center: [1, 0, 1]\n"
    "- Object Center: null</thinking><answer>A</answer>"
)
CAMERA = math.exp(-0.5)
MODULE = """
import os, signal, sys, time
NOT_CALLABLE = 3
def half(completion, solution, record): return 0.5
def short(completion, solution, record, *, limit=1000): return float(len(completion) < limit)
def from_record(completion, solution, record): return record["difficulty"] * (solution["answer"] == "A")
def leaves(completion, solution, record): sys.exit()
def leaves_well(completion, solution, record): raise SystemExit(0)
def is_interrupted(completion, solution, record): os.kill(os.getpid(), signal.SIGINT); return time.sleep(5) or 0.0
def interrupts(completion, solution, record): raise KeyboardInterrupt
def closes(completion, solution, record): raise GeneratorExit("now")
def raises(completion, solution, record): raise KeyError("speed")
def too_few(completion): return 1.0
def returns_two(completion, solution, record): return 2
def returns_negative(completion, solution, record): return -1e-9
def returns_nan(completion, solution, record): return float("nan")
def returns_inf(completion, solution, record): return float("inf")
def returns_none(completion, solution, record): return None
def returns_huge(completion, solution, record): return 1e308
def returns_endless(completion, solution, record): return 10 ** 5000
def says_much(completion, solution, record): raise KeyError("x" * 10_000_000)
def returns_text(completion, solution, record): return "0.5"
class Counted:
    def __call__(self, completion, solution, record): return True
instance = Counted()
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """A package of the user's own on the Python path."""
    folder = tmp_path / "someones_rewards"
    folder.mkdir()
    (folder / "__init__.py").write_text("def top(completion, solution, record): return 0.25\n")
    (folder / "mine.py").write_text(MODULE)
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit()\n")
    (folder / "needy.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_preset_alone_is_its_score():
    for preset in ("paper", "release"):
        expected = score(TEXT, SOLUTION, preset)
        for weight in (1, 0.3, 7.0):
            found = load_rewards({preset: weight})(TEXT, SOLUTION, {})
            assert found == pytest.approx(expected | {preset: expected["total"]})
    assert load_rewards({"paper": 1})(TEXT, Solution.from_record(SOLUTION), None)["total"] == pytest.approx(
        0.85 + 0.15 * CAMERA
    )


def test_single_components():
    same = load_rewards({"accuracy": 0.5, "format": 0.2, "camera": 0.15, "object": 0.15})
    assert same(TEXT, SOLUTION, {}) == pytest.approx(score(TEXT, SOLUTION, "paper"))
    assert load_rewards({"accuracy": 1, "camera": 3})(TEXT, SOLUTION, {})["total"] == pytest.approx(
        (1 + 3 * CAMERA) / 4
    )


def test_several_at_once():
    rewards = load_rewards(
        {
            "paper": 1.0,
            "someones_rewards.mine:half": 0.5,
            "someones_rewards.mine.from_record": 0.5,
            "someones_rewards:top": 0,
            "someones_rewards.mine:instance": 2,
        }
    )
    found = rewards(TEXT, SOLUTION, {"id": "q1", "difficulty": 0.8})
    paper = 0.85 + 0.15 * CAMERA
    assert found["someones_rewards.mine:half"] == 0.5
    assert found["someones_rewards.mine.from_record"] == 0.8
    assert found["someones_rewards:top"] == 0.25  # reported, though it does not count
    assert (found["accuracy"], found["camera"], found["paper"]) == pytest.approx((1, CAMERA, paper))
    assert found["total"] == pytest.approx((paper + 0.5 * 0.5 + 0.5 * 0.8 + 2 * 1) / 4)
    assert all(type(v) is float for v in found.values())


def test_functions_alone_need_no_solution_of_ours():
    rewards = load_rewards({"someones_rewards.mine:short": 1})
    assert rewards("x", "any text", None) == {"someones_rewards.mine:short": 1.0, "total": 1.0}
    with pytest.raises(SolutionError):
        load_rewards({"accuracy": 1})("x", "any text", None)


def test_many_ones_stay_within_one():
    spec = {f"someones_rewards.mine{mark}instance": 0.1 for mark in ":."} | {"someones_rewards.mine:short": 0.7}
    assert load_rewards(spec)("x", None, None)["total"] == 1.0


def test_numpy_numbers_are_numbers(tmp_path):
    (tmp_path / "with_numpy.py").write_text("import numpy as np\ndef f(c, s, r): return np.float32(0.5)\n")
    assert load_rewards({"with_numpy:f": np.float64(2)})("", None, None) == {"with_numpy:f": 0.5, "total": 0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised KeyError: 'speed' on record 'q1'"),
        ("leaves", "raised SystemExit on record 'q1'"),
        ("leaves_well", "raised SystemExit: 0 on record 'q1'"),
        ("closes", "raised GeneratorExit: now on record 'q1'"),
        ("returns_two", "returned 2 on record 'q1'; it must return a number in"),
        ("returns_negative", "returned -1e-09"),
        ("returns_nan", "returned nan"),
        ("returns_inf", "returned inf"),
        ("returns_none", "returned None"),
        ("returns_text", "returned '0.5'"),
        ("returns_huge", r"returned 1e\+308 on record 'q1'; it must return a number in"),
        ("returns_endless", "returned a number of type int, too long to be written on record 'q1'"),
        ("says_much", r"raised KeyError: 'x{1000,}\.\.\. on record"),
    ],
)
def test_a_misbehaving_function_is_named(name, message):
    path = f"someones_rewards.mine:{name}"
    rewards = load_rewards({"paper": 1, path: 0})  # even where its weight is 0
    with pytest.raises(RewardError, match=f"reward '{path}' {message}"):
        rewards(TEXT, SOLUTION, {"id": "q1"})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("papper", "neither built in nor a path .* did you mean 'paper'"),
        ("acuracy", "did you mean 'accuracy'"),
        ("thing", "known: paper, release, accuracy"),
        ("", "neither built in nor a path"),
        (":f", "neither built in nor a path"),
        ("a b:f", "neither built in nor a path"),
        (".mine:half", "neither built in nor a path"),
        ("someones_rewards.mine:half(1)", "neither built in nor a path"),
        ("nobodys_rewards:f", "no module 'nobodys_rewards'.*PYTHONPATH"),
        ("someones_rewards.yours:f", "no module 'someones_rewards.yours'"),
        ("someones_rewards.needy:f", "'someones_rewards.needy' needs 'a_library_that_nobody_has'"),
        ("someones_rewards.broken:f", "importing 'someones_rewards.broken' raised ZeroDivisionError"),
        ("someones_rewards.leaves:f", "importing 'someones_rewards.leaves' raised SystemExit"),
        ("someones_rewards.mine:haff", "no such function, did you mean 'half'"),
        ("someones_rewards.mine:NOT_CALLABLE", "is not a function .* it is of type int"),
        ("someones_rewards.mine:too_few", r"takes \(completion\)"),
    ],
)
def test_a_path_that_leads_nowhere(path, message):
    with pytest.raises(RewardError, match=message) as caught:
        load_rewards({path: 1.0})
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "no reward is set"),
        ({"paper": -1}, "weight of reward 'paper'"),
        ({"paper": math.nan}, "weight of reward 'paper'"),
        ({"paper": math.inf}, "weight of reward 'paper'"),
        ({"paper": "1"}, "weight of reward 'paper'"),
        ({"paper": True}, "weight of reward 'paper'"),
        ({"paper": 0.0}, "sum to something above 0"),
        ({"paper": 1e308, "someones_rewards:top": 1e308}, "sum to something above 0"),
        ({"paper": 1, "release": 1}, "not paper, release together"),
        ({"paper": 1, "accuracy": 1}, "not paper, accuracy together"),
    ],
)
def test_a_wrong_spec(spec, message):
    with pytest.raises(RewardError, match=message):
        load_rewards(spec)


def test_both_kinds_of_path_lead_to_the_same_function():
    assert load_function("someones_rewards.mine:half") is load_function("someones_rewards.mine.half")
    assert load_function("math:hypot")(0.3, 0, 0) == 0.3  # a function that gives no signature away is taken at its word


def test_only_the_user_interrupts(monkeypatch):
    """Told from a function that raises the same by whether the handler of the signal is where it came from."""
    call = load_rewards({"someones_rewards.mine:interrupts": 1.0})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    try:
        with pytest.raises(KeyboardInterrupt):  # the usual handler leaves no trace
            call("x", None, {"id": "q1"})
        signal.signal(signal.SIGINT, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(RewardError, match="raised KeyboardInterrupt on record 'q1'"):
            call("x", None, {"id": "q1"})
        with StopSignal() as stop:
            with pytest.raises(RewardError, match="raised KeyboardInterrupt"):
                call("x", None, {"id": "q1"})
            os.kill(os.getpid(), signal.SIGINT)
            assert stop
            slow = load_rewards({"someones_rewards.mine:is_interrupted": 1.0})
            with pytest.raises(KeyboardInterrupt):
                slow("x", None, {"id": "q1"})
    finally:
        signal.signal(signal.SIGINT, before)
