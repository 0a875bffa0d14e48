"""How far one gets without the video: accuracies of guessers that see only the questions' text.

Each guesser learns on half of the source videos and is scored on the other half, both ways round, so that a figure
above chance is a leak and not the luck of having seen the answers. Rows are those of `Question.record`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from scipy.special import chdtrc

from data_prep.questions.balance import fraction, gap_bin
from data_prep.questions.options import LETTERS
from data_prep.questions.propose import QuestionRow
from data_prep.scenes.relations import LABELS

_PRIOR_WEIGHT = 4.0  # a habit seen a few times is trusted little


def baselines(rows: Sequence[QuestionRow], seed: int = 0) -> dict[str, dict[str, float]]:
    """Compute the accuracy in [0, 1] of each guesser per subtask.

    Guessers: `letter_prior`; `rank_prior` (distances); `longest_text`; `class_prior` (which label, or which range of
    metres, tends to be true); `template_prior` (the same, or the rank, given the phrasing); `option_geometry` (the rank
    given the options' spacing, the label given which labels are offered); `frame_gap` (the rank or label given how far
    apart the frames are).

    Returns:
      {subtask: {guesser: accuracy, ..., "chance": mean of 1 / options, "count": rows}}; `rank_prior` only where options
      are distances.
    """
    groups: dict[str, list[QuestionRow]] = {}
    for row in rows:
        groups.setdefault(row["question_type"], []).append(row)
    sums: dict[str, Counter[str]] = {}
    for scenario, group in sorted(groups.items()):
        total = sums.setdefault(group[0]["subtask"], Counter())
        total["count"] += len(group)
        total["chance"] += sum(1 / len(row["options"]) for row in group)
        for name, guesser in _GUESSERS.items():
            if name != "rank_prior" or not LABELS[scenario]:
                total[name] += _crossed(group, guesser, seed)
        total["longest_text"] += sum(_expected(row, list(map(len, row["options"].values()))) for row in group)
    return {
        subtask: {name: value / total["count"] if name != "count" else float(value) for name, value in total.items()}
        for subtask, total in sums.items()
    }


def letter_test(rows: Sequence[QuestionRow], options: int = 4) -> tuple[float, float]:
    """Test the letters of questions with that many options against the uniform distribution: (chi-square, p).

    Raises:
      ValueError: options is not 2, 3 or 4, or there are no such rows.
    """
    letters = Counter(row["answer"] for row in rows if len(row["options"]) == options)
    count = letters.total()
    if options not in (2, 3, 4) or not count:
        raise ValueError(f"the letter test needs questions with 2, 3 or 4 options; {count} rows have {options}")
    expected = count / options
    statistic = sum((letters[letter] - expected) ** 2 for letter in LETTERS[:options]) / expected
    return statistic, float(chdtrc(options - 1, statistic))


def _values(row: QuestionRow) -> list[Any]:
    """The labels on offer, or metres."""
    texts = row["options"].values()
    return list(texts) if LABELS[row["question_type"]] else [float(text) for text in texts]


def _ranks(row: QuestionRow) -> list[Hashable]:
    """What an option is, apart from its size: its rank among distances, or its label."""
    values = _values(row)
    order = sorted(values)
    return values if LABELS[row["question_type"]] else [order.index(value) for value in values]


def _sizes(row: QuestionRow) -> list[Hashable]:
    """A distance to about 10 %, or the label."""
    values = _values(row)
    if LABELS[row["question_type"]]:
        return values
    return [round(math.log(value) / 0.1) if value > 0 else None for value in values]


def _geometry(row: QuestionRow) -> Hashable:
    """Largest / smallest and the place of the second and third between them, coarsely; or the set of labels."""
    values = sorted(_values(row))
    if LABELS[row["question_type"]]:
        return tuple(values)
    logs = [math.log(max(value, 0.05)) for value in values]
    span = logs[3] - logs[0]
    return (min(round(span / 0.15), 12), round(3 * (logs[1] - logs[0]) / span), round(3 * (logs[2] - logs[0]) / span))


Guesser = tuple[Callable[[QuestionRow], Hashable], Callable[[QuestionRow], list[Hashable]]]  # context, each option
_GUESSERS: Mapping[str, Guesser] = {
    "letter_prior": (lambda row: None, lambda row: list(row["options"])),
    "rank_prior": (lambda row: None, _ranks),
    "class_prior": (lambda row: None, _sizes),
    "template_prior": (lambda row: row["template"].split(".")[0], _ranks),
    "option_geometry": (_geometry, _ranks),
    "frame_gap": (lambda row: gap_bin(row["frames"]), _ranks),
}


def _crossed(rows: Sequence[QuestionRow], guesser: Guesser, seed: int) -> float:
    """Expected number of right guesses, each half answered by what the other half teaches."""
    folds: tuple[list[QuestionRow], list[QuestionRow]] = ([], [])
    for row in rows:
        folds[fraction(seed, "fold", row["source_id"]) < 0.5].append(row)
    context, describe = guesser
    right = 0.0
    for learn, score in (folds, folds[::-1]):
        shown, true = Counter(), Counter()
        for row in learn:
            where = context(row)
            for letter, what in zip(row["options"], describe(row), strict=True):
                shown[where, what] += 1
                true[where, what] += letter == row["answer"]
        for row in score:
            where, chance = context(row), 1 / len(row["options"])
            keys = [(where, what) for what in describe(row)]
            rates = [(true[key] + _PRIOR_WEIGHT * chance) / (shown[key] + _PRIOR_WEIGHT) for key in keys]
            right += _expected(row, rates)
    return right


def _expected(row: QuestionRow, scores: Sequence[float]) -> float:
    """Chance of hitting the answer when one of the best-scored options is picked at random."""
    best = max(scores)
    picks = [letter for letter, score in zip(row["options"], scores, strict=True) if score == best]
    return (row["answer"] in picks) / len(picks)
