"""Options at a wide spacing, and answers that say first what was measured."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from data_prep.questions.options import numeric_options
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.scenarios import KindError, spacings
from data_prep.scenes.relations import LABELS
from mllm4d_jax.qa.answers import extract_answer
from mllm4d_jax.qa.options import split_question
from tests.data_prep.scenes.random_scenes import random_scene

WIDE = spacings(("object_absolute_distance=1.65", "camera_absolute_distance=1.65"))


def test_neighbours_are_spaced_as_asked_and_any_rank_may_be_true():
    """The span of a set is the spacing cubed, but for rounding to one decimal; every rank is as likely."""
    rng, ranks = random.Random(0), Counter()
    for _ in range(4000):
        truth = math.exp(rng.uniform(math.log(1.5), math.log(9)))
        texts, rank = numeric_options(truth, "exchangeable", rng, spacing=1.65)
        metres = [float(text) for text in texts]
        assert metres == sorted(set(metres))
        assert (metres[0] - 0.05) * 1.65**3 <= metres[3] + 0.05 and metres[3] - 0.05 <= (metres[0] + 0.05) * 1.65**3
        assert abs(metres[rank] - truth) <= 0.0501
        ranks[rank] += 1
    assert all(abs(ranks[k] - 1000) < 120 for k in range(4))


def test_wide_spacing_takes_truths_that_the_paper_s_bounds_refuse():
    narrow, wide = (
        [numeric_options(0.5, "exchangeable", random.Random(n), spacing=s) for n in range(99)] for s in (0, 1.65)
    )
    assert not any(narrow) and any(wide)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("object_absolute_distance", "needs a ratio above 1.1 and up to 4, not ''"),
        ("object_absolute_distance=1.05", "needs a ratio above 1.1"),
        ("object_absolute_distance=wide", "not 'wide'"),
        ("object_absolute_distence=1.5", "did you mean 'object_absolute_distance'"),
        ("camera_relative_direction=1.5", "has no distances"),
    ],
)
def test_a_spacing_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(KindError, match=f"questions.spacing.*{message}"):
        spacings((wrong,))


def test_answers_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="answers must be of letter, measured"):
        QuestionRules(answers="words")


def test_measured_answers_say_the_value_and_then_the_letter_nearest_to_it():
    asked = propose(random_scene(2, frames=50), QuestionRules(answers="measured", spacing=WIDE), 0)
    assert {question.scenario for question in asked} > {"camera_relative_direction", "object_absolute_distance"}
    for question in asked:
        row = question.record("v.mp4")
        prompt, reply = (turn["value"] for turn in row["conversations"])
        options = split_question(prompt)[1]
        assert extract_answer(reply, options).letter == row["answer"] == question.answer
        said = reply.removeprefix("<thinking>").partition(":")[0]
        if LABELS[question.scenario]:
            assert said == options[question.answer] == question.label
        else:
            nearest = min(options, key=lambda letter: abs(float(options[letter]) - float(said)))
            assert said == f"{question.value:.1f}" and nearest == question.answer
    plain = propose(random_scene(2, frames=50), QuestionRules(spacing=WIDE), 0)
    assert [q.record("v.mp4")["conversations"][1]["value"] for q in plain] == [q.answer for q in asked]
