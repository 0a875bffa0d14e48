"""Text about spatial states: centres to be written as such, and questions that follow from states that are told.

They teach how states are written and what follows from them: which way a difference goes, how long it is, which option
is nearest. The states are never those of the clip that is seen beside them, so nothing is said of metres in pictures.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from data_prep.captions.captions import CAMERA, Caption
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.wording import state_block, vector_text
from data_prep.scenes.scene import Scene
from mllm4d_jax.qa.options import lettered, write_question

WRITE = "State of {o} at frame {f}: {n}"


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


def written_state(rng: random.Random, frames: int) -> Caption:
    """Ask for one centre of a clip of `frames` to be written as a state; drawn about as those of small rooms are."""
    camera, thing = [0.0, 0.0, 0.0], None
    if rng.random() < 0.5:
        what, center = CAMERA, [rng.gauss(0, 0.6) for _ in range(3)]
        camera = center
    else:
        what, center = "the object", [rng.gauss(0, 0.8), rng.gauss(0.3, 0.4), 0.6 + rng.expovariate(0.5)]
        thing = center
    frame, numbers = rng.randrange(frames), vector_text(center, 1).strip("[]")
    state = state_block(f"frame {frame}", camera, thing, 1)
    return WRITE.format(o=what, f=frame, n=numbers), f"{state}\n"
