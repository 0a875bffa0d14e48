"""Answers computed again from nothing but the centres that a record's solution holds."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import numpy as np
import pytest

from data_prep.questions.blind import baselines
from data_prep.questions.options import numeric_options
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.scenarios import SCENARIOS
from data_prep.scenes.scene import Scene
from tests.data_prep.scenes.random_scenes import random_scene

TAU = 0.25


def grown(scene: Scene, times: float) -> Scene:
    """The scene with objects `times` as large: the nearest point and the centre differ more."""
    objects = []
    for o in scene.objects:
        middle = np.nanmean(o.points, axis=1, keepdims=True)
        objects.append(dataclasses.replace(o, points=middle + times * (o.points - middle)))
    return dataclasses.replace(scene, objects=tuple(objects))


def from_centers(row: dict) -> str:
    """The letter that the centres of a record point to."""
    (start, end), (first, last) = row["solution"]["camera_center"], row["solution"]["object_center"]
    name, options = row["question_type"], row["options"]
    if name.endswith("absolute_distance"):
        ends = {"camera_absolute_distance": (start, end), "object_absolute_distance": (first, last)}
        metres = math.dist(*ends.get(name, (start, last)))
        return min(options, key=lambda letter: abs(float(options[letter]) - metres))
    if name == "camera_relative_direction":
        move = [b - a for a, b in zip(start, end, strict=True)]
        axis = max(range(3), key=lambda n: abs(move[n]))
        said = (("right", "left"), ("down", "up"), ("forward", "backward"))[axis][move[axis] < 0]
    else:
        if name == "object_camera_relative_distance":
            change, more, less = math.dist(end, last) - math.dist(start, first), "farther", "closer"
        elif name == "object_camera_lateral_direction":
            change, more, less = last[0] - first[0], "right", "left"
        else:
            change, more, less = last[2] - first[2], "farther", "closer"
        said = "not moving" if abs(change) < TAU else more if change > 0 else less
    return next((letter for letter, text in options.items() if text == said), f"none: {said}")


@pytest.mark.parametrize("shape", ["exchangeable", "independent"])
@pytest.mark.parametrize("times", [0.5, 1.0, 3.0])
def test_the_centres_of_a_solution_point_to_its_answer(shape, times):
    asked = Counter()
    for seed in range(20):
        for question in propose(grown(random_scene(seed), times), QuestionRules(options=shape), seed):
            row = question.record("clip.mp4")
            assert from_centers(row) == row["answer"], (row, from_centers(row))
            asked[row["question_type"]] += 1
    assert set(asked) == set(SCENARIOS) and min(asked.values()) > 5


@pytest.mark.parametrize("shape", ["exchangeable", "independent"])
def test_options_of_a_distance_that_is_said_otherwise(shape):
    rng, made = random.Random(3), Counter()
    for _ in range(4000):
        truth, off = rng.uniform(0.5, 20), rng.uniform(0.97, 1.2)
        found = numeric_options(truth, shape, rng, truth * off)
        if found:
            texts, rank = found
            assert min(range(4), key=lambda n: abs(float(texts[n]) - truth * off)) == rank
            made[off < 1.05] += 1
    assert min(made.values()) > 50


def test_which_sets_are_refused_says_nothing_about_the_rank():
    """Truths uniform in the logarithm, all off by the same share: every rank is as likely as before."""
    rng = random.Random(5)
    ranks = Counter()
    for _ in range(20_000):
        truth = math.exp(rng.uniform(1.5, 4))
        made = numeric_options(truth, "exchangeable", rng, truth * 1.08)
        ranks[made[1] if made else None] += 1
    kept = [ranks[n] for n in range(4)]
    assert ranks[None] > 2000 and min(kept) > 1000 and max(kept) < 1.1 * min(kept)


def test_large_objects_do_not_make_the_rank_guessable():
    rows = []
    for seed in range(80):
        scene = grown(random_scene(seed), 2.0)
        rows += [q.record("a.mp4") for q in propose(scene, QuestionRules(), 1) if "camera_absolute" in q.scenario]
    figures = baselines(rows)["object_camera_absolute_distance"]
    assert figures["count"] > 250
    for guesser in ("rank_prior", "option_geometry", "letter_prior"):
        assert figures[guesser] < figures["chance"] + 0.06, (guesser, figures)
