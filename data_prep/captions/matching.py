"""Questions that can be answered from their text alone: which option is nearest, and which says a word.

They teach what an answer to a question with options needs besides seeing: that the letter of an option stands for what
follows it, and which of some figures is nearest to another. None of them says anything about a clip.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from data_prep.captions.captions import Caption
from data_prep.questions.options import LETTERS, shuffle
from data_prep.questions.wording import ANCHORS, PHRASINGS, found_text, question_text, short_reasoning
from data_prep.scenes.relations import LABELS
from mllm4d_jax.qa.options import lettered, write_question

# Relation -> the aspect of a caption that it asks for.
ASPECT: Mapping[str, str] = {
    "camera_absolute_distance": "in all",
    "camera_relative_direction": "mainly",
    "object_absolute_distance": "in all",
    "object_camera_absolute_distance": "distance",
    "object_camera_relative_distance": "gap",
    "object_camera_lateral_direction": "sideways",
    "object_camera_longitudinal_direction": "in depth",
}
_LONGEST, _SHORTEST = 7.0, 0.1  # metres of figures
NEAREST, SAME = "Which is nearest to {v}?", "Which says {v}?"


def nearest_number(rng: random.Random) -> Caption:
    """Ask which of four figures is nearest to one given; any of them may be it, and one is clearly the nearest."""
    given, texts, nearest = four_figures(rng)
    asked = NEAREST.format(v=f"{given:.1f}")
    return matched(asked, found_text("", given, nearest), nearest, texts, rng)


def four_figures(rng: random.Random) -> tuple[float, list[str], str]:
    """Draw a figure, four others in order, metres with one decimal, and the one of these that is nearest to it."""
    while True:
        ratio = 1.2 + 0.8 * rng.random()
        lowest = math.exp(math.log(_SHORTEST) + math.log(_LONGEST / _SHORTEST / ratio**2) * rng.random())
        tenths = [round(10 * lowest * ratio**k) for k in range(4)]
        given = round(10 * lowest * ratio ** (rng.random() * 4 - 0.5))
        off = sorted((abs(given - t), k) for k, t in enumerate(tenths))
        if len(set(tenths)) == 4 and tenths[0] > 0 and given > 0 and off[1][0] > off[0][0]:
            break
    texts = [f"{t / 10:.1f}" for t in tenths]
    return given / 10, texts, texts[off[0][1]]


def same_word(rng: random.Random) -> Caption:
    """Ask which option says a given word; the words are the labels of the questions."""
    labels = list(rng.choice([labels for labels in LABELS.values() if labels]))
    shuffle(labels, rng)
    offered = labels[: len(LETTERS)]
    return matched(SAME.format(v=offered[0]), offered[0], offered[0], offered, rng)


def matched(text: str, found: str, right: str, options: list[str], rng: random.Random) -> Caption:
    """Ask a question with options, shuffled here in place; `found` is said before the letter of the `right` one."""
    shuffle(options, rng)
    letter = LETTERS[options.index(right)]
    return write_question(text, lettered(options)), short_reasoning(found, letter)


def worded(rng: random.Random, relation: str, i: int, j: int, frames: int, thing: str) -> str:
    """Return a question about frames i and j of a clip of `frames`, in one of its wordings, without options."""
    phrasing, anchor = rng.randrange(len(PHRASINGS[relation])), rng.randrange(len(ANCHORS))
    return question_text(relation, phrasing, anchor, i, j, frames - 1, thing)
