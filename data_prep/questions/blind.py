"""How far one gets without the video: accuracies of guessers that see only the questions' text.

Each guesser learns on half of the source videos and is scored on the other half, both ways round, so that a figure
above chance is a leak and not the luck of having seen the answers. Where there are few questions, the mean over several
ways to halve them is taken, as one is mostly noise. Rows are those of `Question.record`.
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
_HALVINGS, _SCORED = 32, 4000  # ways to halve the videos: at most so many, and until so many answers are scored
NO_GUESSER = ("chance", "count")


def baselines(rows: Sequence[QuestionRow], seed: int = 0, by: str = "subtask") -> dict[str, dict[str, float]]:
    """Compute the accuracy in [0, 1] of each guesser per subtask, or by another field such as "question_type".

    Guessers: `letter_prior`; `rank_prior` (distances); `longest_text`; `class_prior` (which label, or which range of
    metres, tends to be true); `template_prior` (the same, or the rank, given the phrasing); `option_geometry` (the rank
    given the options' spacing, the label given which labels are offered); `frame_gap` (the rank or label given how far
    apart the frames are).

    Returns:
      {value of `by`: {guesser: accuracy, ..., "chance": mean of 1 / options, "count": rows}}; `rank_prior` only where
      options are distances.
    """
    sums: dict[str, Counter[str]] = {}
    for group in _by_scenario(rows):
        hits = _hits(group, seed)
        for n, row in enumerate(group):
            total = sums.setdefault(row[by], Counter())
            total.update({name: found[n] for name, found in hits.items()})
            total.update(count=1, chance=1 / len(row["options"]))
    return {
        value: {name: total[name] / total["count"] if name != "count" else float(total[name]) for name in total}
        for value, total in sums.items()
    }


def screen(rows: Sequence[QuestionRow], limit: float, seed: int = 0) -> set[str]:
    """Find questions to leave out so that no guesser is more than `limit` above chance in any scenario.

    What is even in every context may still, by chance, favour a habit that was not looked at (a phrasing, a letter),
    the more so the fewer questions there are. Those that the guesser gets right most reliably go first, as in
    adversarial filtering (arXiv 2002.04108). With many questions nothing is left out.

    Returns:
      Their ids.
    """
    out: set[str] = set()
    for scenario in _by_scenario(rows):
        group = list(scenario)
        while group:
            chance, hits = sum(1 / len(row["options"]) for row in group) / len(group), _hits(group, seed)
            worst = max(hits, key=lambda name: sum(hits[name]))
            excess = sum(hits[worst]) / len(group) - chance - limit
            if excess <= 0:
                break
            sure = [(hits[worst][n], sum(each[n] for each in hits.values()), row["id"]) for n, row in enumerate(group)]
            out.update(name for *_, name in sorted(sure)[-math.ceil(excess * len(group)) :])
            group = [row for row in group if row["id"] not in out]
    return out


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


def _by_scenario(rows: Sequence[QuestionRow]) -> list[list[QuestionRow]]:
    groups: dict[str, list[QuestionRow]] = {}
    for row in rows:
        groups.setdefault(row["question_type"], []).append(row)
    return [groups[name] for name in sorted(groups)]


def _hits(rows: Sequence[QuestionRow], seed: int) -> dict[str, list[float]]:
    """Guesser -> the chance that it gets each row right, for the rows of one scenario."""
    labelled = bool(LABELS[rows[0]["question_type"]])
    halves = [
        {name: fraction(seed, *fold, name) < 0.5 for name in {row["source_id"] for row in rows}}
        for k in range(max(1, min(_HALVINGS, _SCORED // len(rows))))
        for fold in (("fold", str(k)) if k else ("fold",),)
    ]
    found = {
        name: _crossed(rows, guesser, halves)
        for name, guesser in _GUESSERS.items()
        if name != "rank_prior" or not labelled
    }
    return found | {"longest_text": [_expected(row, list(map(len, row["options"].values()))) for row in rows]}


def _crossed(rows: Sequence[QuestionRow], guesser: Guesser, halves: Sequence[Mapping[str, bool]]) -> list[float]:
    """Mean over `halves` of each row's chance of a right guess, each half answered by what the other half teaches."""
    context, describe = guesser
    keys = [[(context(row), what) for what in describe(row)] for row in rows]
    right = [0.0] * len(rows)
    for half in halves:
        shown, true = (Counter(), Counter()), (Counter(), Counter())
        for row, described in zip(rows, keys, strict=True):
            side = half[row["source_id"]]
            shown[side].update(described)
            true[side][described[list(row["options"]).index(row["answer"])]] += 1
        for n, (row, described) in enumerate(zip(rows, keys, strict=True)):
            side, chance = not half[row["source_id"]], 1 / len(described)
            rates = [
                (true[side][key] + _PRIOR_WEIGHT * chance) / (shown[side][key] + _PRIOR_WEIGHT) for key in described
            ]
            right[n] += _expected(row, rates)
    return [hits / len(halves) for hits in right]


def _expected(row: QuestionRow, scores: Sequence[float]) -> float:
    """Chance of hitting the answer when one of the best-scored options is picked at random."""
    best = max(scores)
    picks = [letter for letter, score in zip(row["options"], scores, strict=True) if score == best]
    return (row["answer"] in picks) / len(picks)
