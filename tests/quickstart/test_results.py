"""The table of the paper in miniature: every figure against hand computation, and that it fits a terminal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mllm4d_jax.eval.statistics import accuracy, mean, paired_difference
from mllm4d_jax.qa.benchmarks import SUBTASKS
from mllm4d_jax.qa.rewards import Solution
from mllm4d_jax.quickstart.done import StageRecord
from mllm4d_jax.quickstart.page import write_page
from mllm4d_jax.quickstart.results import ROWS, Results, accuracy_difference, error_difference, examine, rewards_of
from mllm4d_jax.quickstart.stages import Stage
from mllm4d_jax.quickstart.tables import text
from tests.eval.question_fixtures import prediction

KINDS = sorted(set(SUBTASKS.values()))
STATES = "**Spatial State (start frame):**\n- Camera Center: {}\n- Object Center: {}\n"


def thought(letter: str, *states: tuple) -> str:
    written = "".join(STATES.format(*(json.dumps(center) for center in pair)) for pair in states)
    return f"<thinking>{written}</thinking><answer>{letter}</answer>"


SOLUTION = Solution("A", ((0.0, 0.0, 0.0), (3.0, 0.0, 4.0)), ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)))
CAMERA_ONLY = Solution("A", ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0)), (None, None))


def examined(responses: dict[str, str], kinds=KINDS[:2]):
    """Questions q0, q1, ... in turn of some subtasks, two about a world."""
    asked = [
        prediction(name, said, video=f"{n // 2}.mp4", subtask=kinds[n % len(kinds)], benchmark="mllm4d")
        for n, (name, said) in enumerate(responses.items())
    ]
    return examine(asked, {name: CAMERA_ONLY if name == "q3" else SOLUTION for name in responses})


def test_centre_errors_are_means_of_written_pairs():
    one = examined(
        {
            "q0": thought("A", ([0, 0, 0], [1, 1, 2]), ([0, 0, 0], [1, 1, 1])),  # camera 0 and 5 off, object 1 and 0
            "q1": thought("B", ([0, 0, 0], [1, 1, 1])),  # one state of two: not counted
            "q2": "A",
            "q3": thought("A", ([0, 0, 0.5], None), ([1, 0, 0], None)),
        }
    )
    assert one.errors == {"camera": {"q0": 2.5, "q3": 0.25}, "object": {"q0": 0.5}}
    assert one.asked == {"camera": 4, "object": 3}
    assert one.error("camera").value == 1.375 and one.error("object").n == 1
    assert one.accuracy().value == 0.75 and one.accuracy(KINDS[1]).value == 0.5


def test_differences_are_on_the_same_questions_and_clustered_by_world():
    rng = np.random.default_rng(0)
    said = [
        {
            f"q{n}": thought(
                "A" if rng.random() < share else "B", ([off * rng.random(), 0, 0], None), ([3, 0, 4], None)
            )
            for n in range(40)
        }
        for share, off in ((0.4, 2.0), (0.8, 1.0))
    ]
    del said[1]["q7"]
    first, second = map(examined, said)
    names = [name for name in sorted(said[0]) if name != "q7"]
    worlds = [first.answers[name].video for name in names]
    right = [[one.answers[name].correct for name in names] for one in (first, second)]
    assert accuracy_difference(first, second) == paired_difference(*right, worlds)
    apart = [second.errors["camera"][name] - first.errors["camera"][name] for name in names]
    assert error_difference(first, second, "camera").value == pytest.approx(np.mean(apart))
    assert error_difference(first, second, "camera").high < 0
    assert error_difference(first, second, "object").n == 0


def test_the_mean_of_any_values_scales_as_its_interval_does():
    rng = np.random.default_rng(1)
    right, worlds = rng.random(60) < 0.3, np.arange(60) // 3
    share, metres = accuracy(right, worlds), mean(-4.0 + 10.0 * right, worlds)
    for name in ("value", "low", "high"):
        assert getattr(metres, name) == pytest.approx(-4 + 10 * getattr(share, name), abs=1e-12)
    assert math.isnan(mean([2.0, 2.0], [0, 1]).low) and mean([2.0, 2.0], [0, 1]).value == 2
    assert math.isnan(mean([], []).value)


def test_rewards_of_the_first_and_the_last_tenth(tmp_path):
    rows = [
        {"step": n + 1, **{f"reward/{name}": n / 20 for name in ("accuracy", "format", "camera", "object")}}
        for n in range(20)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = rewards_of(tmp_path)
    assert list(found) == ["paper", "accuracy", "format", "camera", "object"]
    for means in found.values():
        assert means == pytest.approx((0.025, 0.925))


@pytest.fixture
def results(tmp_path):
    """Of all models: the n-th row has n of 24 questions right; the last two write centres."""
    models, names = {}, [f"q{n}" for n in range(24)]
    for n, row in enumerate(ROWS):
        off = n - 8.0
        state = ([off, 0, 0], [1, 1, 1]), ([3 + off, 0, 4], [1, 1, 1])
        said = [thought("A" if k <= n else "B", *(state if n > 5 else ())) for k in range(24)]
        models[row] = examined(dict(zip(names, said, strict=True)), KINDS)
    for name in ("sft", "cold_start", "control", "grpo_without_st", "grpo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "reward": 0.1}\n')
    stage = Stage("sft", "fine-tuning", "configs/sft.py:tiny", {"train.steps": 3}, (), "out/sft", 1.0)
    rewards = {
        name: dict.fromkeys(("paper", "accuracy", "format", "camera", "object"), (0.1, 0.2))
        for name in ("grpo_without_st", "grpo")
    }
    chance = dict.fromkeys(KINDS, 0.25)
    solutions = dict.fromkeys(names, SOLUTION) | {"q3": CAMERA_ONLY}
    return Results(models, solutions, chance, rewards, [(stage, StageRecord({}, {}, {}, 61.0, 1234.5))])


def test_the_table_says_what_was_reached_and_fits_the_terminal(results):
    shown = text(results)
    assert max(map(len, shown.splitlines())) <= 100
    lines = {line.split("  ")[0]: line for line in reversed(shown.splitlines())}  # those of the first table
    assert all(name in lines for name in (*ROWS.values(), "chance", "GRPO with ST - cold start"))
    assert " 33.3 [" in lines["GRPO with ST"]
    assert lines["GRPO with ST"].split()[-2:] == ["1.07", "0.00"]  # (23 x 1 + (1 + 17 ** 0.5) / 2) / 24
    assert lines["base model"].split()[-2:] == ["–", "–"] and " 4.2 [" in lines["base model"]
    assert lines["chance"].split()[1] == "25.0"
    assert "0.100 -> 0.200" in shown


def test_the_page_shows_tables_answers_of_all_models_and_maps(results, tmp_path):
    page = write_page(tmp_path, results).read_text()
    for wanted in ("GRPO without ST", "camera, said", "<svg", "1:01", "1,234", "configs/sft.py:tiny", "Differences on"):
        assert wanted in page
