"""What balancing did, per split and scenario: proposed, kept, the class that was short, and the best blind guesser."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from data_prep.questions.balance import SPLITS, kinds_of
from data_prep.questions.blind import NO_GUESSER, baselines
from data_prep.questions.propose import QuestionRow
from data_prep.questions.scenarios import SCENARIOS

_TELLING = 0.15  # largest noise with which an accuracy says something: that of some 35 questions

Guessed = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Tally:
    """One split of one scenario.

    Attributes:
      split, scenario: which.
      proposed, kept: questions before and after balancing.
      short: the classes of which nothing was proposed, else the one of which least was, with its number.
      guesser, accuracy: the best of the blind guessers on what is kept, and its accuracy in [0, 1]; "" and nan if
        nothing is kept.
      chance: mean of 1 / options of what is kept.
    """

    split: str
    scenario: str
    proposed: int
    kept: int
    short: str
    guesser: str
    accuracy: float
    chance: float

    @property
    def noise(self) -> float:
        """Twice the standard error of guessing on that many questions."""
        return 2 * math.sqrt(self.chance * (1 - self.chance) / self.kept) if self.kept else math.nan


def guess(rows: Sequence[QuestionRow], chosen: Collection[str], seed: int) -> Guessed:
    """Compute the blind guessers' figures of the questions whose ids are in `chosen`: split -> scenario -> figures."""
    kept = {split: [row for row in rows if row["id"] in chosen and row["split"] == split] for split in SPLITS}
    return {split: baselines(group, seed, "question_type") for split, group in kept.items() if group}


def tally(rows: Sequence[QuestionRow], guessed: Guessed) -> list[Tally]:
    """Count all proposed questions and those kept; scenarios and splits of which none was proposed are not there.

    Args:
      rows: with "split" besides the fields that `balance.select` reads.
      guessed: of the questions kept, see `guess`.
    """
    groups: dict[tuple[str, str], list[QuestionRow]] = {}
    for row in rows:
        groups.setdefault((row["split"], row["question_type"]), []).append(row)
    found = []
    for split in SPLITS:
        for scenario in SCENARIOS:
            group = groups.get((split, scenario))
            figures = guessed.get(split, {}).get(scenario, {"count": 0.0, "chance": math.nan, "": math.nan})
            best = max((name for name in figures if name not in NO_GUESSER), key=lambda name: figures[name])
            count, chance = int(figures["count"]), figures["chance"]
            if group:
                short = _short(scenario, group)
                found.append(Tally(split, scenario, len(group), count, short, best, figures[best], chance))
    return found


def table(tallies: Sequence[Tally]) -> str:
    """Lay the counts and figures out as lines of text, a head first; "few" for an accuracy that is mostly noise."""
    lines = [
        f"{'questions':44}{'proposed':>9}{'kept':>7}{'blind':>8}{'chance':>8}{'noise':>8}  fewest of (proposed); best "
        "blind guesser"
    ]
    for one in tallies:
        shown = f"{one.accuracy:8.3f}" if one.noise <= _TELLING else f"{'few':>8}"
        blind = f"{shown}{one.chance:8.3f}{one.noise:8.3f}" if one.kept else " " * 24
        told = f"{one.short}; {one.guesser}" if one.kept else f"{one.short}"
        lines.append(f"{one.split + ' ' + one.scenario:44}{one.proposed:9}{one.kept:7}{blind}  {told}")
    for split in SPLITS:
        ours = [one for one in tallies if one.split == split]
        if ours:
            proposed, kept = sum(one.proposed for one in ours), sum(one.kept for one in ours)
            lines.append(f"{split + ' in all':44}{proposed:9}{kept:7}  {kept / proposed:.0%} of the proposed")
    return "\n".join(lines)


def _short(scenario: str, rows: Sequence[QuestionRow]) -> str:
    labelled = bool(rows[0]["label"])
    counts = Counter(row["label"] if labelled else row["rank"] for row in rows)
    sizes = {kind: counts[kind] for kind in kinds_of(scenario)}
    missing = [kind for kind, size in sizes.items() if not size]
    least = missing or [min(sizes, key=lambda kind: sizes[kind])]
    return ", ".join(f"{kind if labelled else f'rank {kind + 1} of 4'}: {sizes[kind]}" for kind in least)
