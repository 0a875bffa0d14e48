"""Text about spatial states that are told: what they come to, and questions that follow from them.

It teaches how states are written and what follows from them: which way a difference goes, how long it is, which option
is nearest. The states are never those of the clip that is seen beside them, so nothing is said of metres in pictures.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import numpy as np

from data_prep.captions.captions import CAMERA, Caption
from data_prep.captions.matching import ASPECT, SAME, four_figures, matched
from data_prep.captions.placed import THING
from data_prep.questions.options import LETTERS
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.states import Pair, stated
from data_prep.questions.wording import brief_state, found_text
from data_prep.scenes.relations import CAMERA_DIRECTIONS, LABELS, RULES, classes_of
from data_prep.scenes.scene import Scene
from mllm4d_jax.qa.options import lettered, write_question

_OBJECTS = 0.8  # of pairs of states have an object in them
_WORDS = 0.5  # of the options that are looked up behind states are words, the others figures
_THIRD = 1.0 / 3  # of the changes that are drawn are small


def told_questions(scene: Scene, rules: QuestionRules, seed: int, rng: random.Random, count: int) -> Iterator[Caption]:
    """Yield at most `count` questions about a scene, each of another relation, behind the states they follow from.

    Args:
      rules: of the questions; answers say the states again, whatever the rules have.
    """
    asked = {}
    questions = propose(scene, dataclasses.replace(rules, answers="states"), seed)
    for question in rng.sample(questions, len(questions)):
        asked.setdefault(question.scenario, question)
    for scenario in rng.sample(sorted(asked), min(count, len(asked))):
        question = asked[scenario]
        states = "\n".join(question.states)
        yield f"{states}\n{write_question(question.text, lettered(question.options))}", question.spoken


def derived(rng: random.Random, frames: int) -> Caption:
    """Ask what two states, of the first and the last of `frames`, come to: every aspect, in any order.

    The answer has a figure for each, and its label. What is right follows from the centres as they are written; they
    are drawn like those of small rooms.
    """
    camera, thing = _centers(rng, rng.random() < _OBJECTS)
    values = stated(*(None if c is None else Pair(c[:1], c[1:]) for c in (camera, thing)))
    asked = rng.sample(list(values), len(values))
    names = " ".join([CAMERA if thing is None else THING, *(ASPECT[name] for name in asked)])
    answer = " ".join(f"{ASPECT[name]} {_found(name, values[name])}" for name in asked)
    return f"{_written(camera, thing, frames)}\n{names}", answer


def letter_behind_states(rng: random.Random, frames: int) -> Caption:
    """Ask which of four options says a word or a figure; two states stand between the options and the answer.

    So far from its options stands the letter of an answer that says first where things are.
    """
    camera_only = rng.random() < _WORDS
    options = rng.sample(CAMERA_DIRECTIONS, len(LETTERS)) if camera_only else four_figures(rng)[1]
    found = rng.choice(options)
    asked, answer = matched(SAME.format(v=found), found, found, options, rng)
    return f"{asked}\n{_written(*_centers(rng, not camera_only), frames)}", answer


def _centers(rng: random.Random, with_object: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw centres f64[2, 3] of the camera and of an object, or None, in the first and the last frame."""
    camera = np.array([[0.0, 0.0, 0.0], _move(rng)]).round(1) + 0.0
    if not with_object:
        return camera, None
    start = np.array([rng.gauss(0, 0.8), rng.gauss(0.3, 0.4), 1.2 + rng.expovariate(0.5)])
    return camera, np.array([start, start + _move(rng)]).round(1) + 0.0


def _written(camera: np.ndarray, thing: np.ndarray | None, frames: int) -> str:
    centers = zip((0, frames - 1), camera, (None, None) if thing is None else thing, strict=True)
    return "\n".join(brief_state(*state) for state in centers)


def _found(relation: str, values: np.ndarray) -> str:
    """What a value f64[1], or a displacement f64[1, 3], of a relation comes to."""
    values = values.round(1) + 0.0  # no negative zero
    if not LABELS[relation]:
        return f"{values[0]:.1f}"
    rules = dataclasses.replace(RULES, min_motion=0.0, dominance=1.0, margin=0.0)
    label = LABELS[relation][int(classes_of(relation, values, rules)[0])]
    return label if values.ndim > 1 else found_text("", values[0], label)


def _move(rng: random.Random) -> list[float]:
    """Draw a displacement f64[3], metres: mostly along the floor, and often too small to count."""
    size = 0.15 if rng.random() < _THIRD else 0.8
    return [rng.gauss(0, size), rng.gauss(0, 0.25 * size), rng.gauss(0, size)]
