"""How many questions of each class may be kept so that knowing how often each answer occurs is worth little.

A context is what a reader without the video sees and the answer may depend on: how far apart the frames are, or how
large the distances on offer. Within a context every class is capped at one level; a class that has fewer keeps all of
them. Who knows the classes' frequencies there answers with the most frequent one on offer. Of L classes, of which a
question offers the true one and M - 1 others drawn uniformly, the class of frequency rank r = 0, 1, ... is the most
frequent on offer with probability C(L - 1 - r, M - 1) / C(L - 1, M - 1): this reader's hits are the sum over classes of
that times their number. Raising a cap by one adds one question of each class that still has some; it costs the hits
added less the hits allowed for the questions added. Steps that add many classes pay for those that add few.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

Step = tuple[Hashable, tuple[Hashable, ...]]  # context, the classes of which one question more is kept


def cap_steps(
    counts: Mapping[Hashable, Mapping[Hashable, int]], kinds: Sequence[Hashable], offered: int, slack: float
) -> list[Step]:
    """List the steps that may be taken, in order; what every beginning of the list keeps is within the bound.

    Equal classes rarely divide a number that is wanted: with a slack of 0 a last step follows, after which some classes
    have one question more than the others.

    Args:
      counts: context -> class -> questions there are.
      kinds: all classes there are, also those that nobody has.
      offered: options of a question.
      slack: accuracy above 1 / offered that a reader may reach who knows the class frequencies of each context. With 0
        only steps of all classes can be paid.
    """
    hits = _hits(len(kinds), offered)
    waiting: list[tuple[int, float, int, Step]] = []
    for number, (place, found) in enumerate(counts.items()):
        levels = [[kind for kind in kinds if found.get(kind, 0) > t] for t in range(max(found.values(), default=0))]
        wide = [len(level) for level in levels]
        for t, level in enumerate(levels):
            # Contexts take part in proportion to what they have: as levels of one width pass, all are equally far.
            far = (t - wide.index(len(level)) + 0.5) / wide.count(len(level))
            waiting.append((-len(level), far, number, (place, tuple(level))))
    spent, taken = 0.0, []
    for negative, _, _, step in sorted(waiting, key=lambda entry: entry[:3]):
        spent += hits[-negative] - (1 / offered + slack) * -negative
        if spent > 1e-9:
            return taken + [step] * (bool(taken) and not slack)
        taken.append(step)
    return taken


def expected_accuracy(counts: Mapping[Hashable, Mapping[Hashable, int]], classes: int, offered: int) -> float:
    """Compute the accuracy in [0, 1] of a reader who knows the class frequencies of each context; nan without rows."""
    hits, right = _hits(classes, offered), 0.0
    for found in counts.values():
        ordered = sorted(found.values(), reverse=True)
        right += sum(count * (hits[rank + 1] - hits[rank]) for rank, count in enumerate(ordered))
    total = sum(sum(found.values()) for found in counts.values())
    return right / total if total else math.nan


def _hits(classes: int, offered: int) -> list[float]:
    """Hits of one question each of the g most frequent classes, for g = 0 ... classes."""
    hits = [0.0]
    for rank in range(classes):
        hits.append(hits[-1] + math.comb(classes - 1 - rank, offered - 1) / math.comb(classes - 1, offered - 1))
    return hits
