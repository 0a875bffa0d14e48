"""Choosing questions: shares per scenario, even classes, few questions per video, one split per source video.

Knowing how often each answer occurs must be worth little: labels are capped separately for short and long stretches of
frames (otherwise "not moving" follows from two frame numbers that are close together), ranks of the true distance
separately for small and large distances (otherwise, where large ones are rare, the smaller options are the better
guess) and, where there are many, for short and long stretches too. `caps` says how far: a held-out set allows nothing
and its classes are equal; a training set allows `slack`, and so uses most of what there is even where one answer is
much more frequent. Among equally good questions those whose right letter is rarer so far come first, so that letters
are even too and not only on average.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import Any

from data_prep.questions.caps import Step, cap_steps
from data_prep.questions.options import LETTERS
from data_prep.questions.scenarios import SCENARIOS
from data_prep.scenes.relations import LABELS
from mllm4d_jax.qa.benchmarks import SUBTASKS

_SIZE_STEP = 0.1  # least width of a bin of sizes, in the natural logarithm
_BIN_ROWS = 32  # least rows in a bin: with fewer, some class has none by chance
_GAP_ROWS = 8 * _BIN_ROWS  # least rows of distances in a bin of gaps, which is then divided by size
SPLITS = ("train", "bench")


def fraction(seed: int, *names: str) -> float:
    """Return a number in [0, 1) that depends on seed and names alone, spread evenly."""
    text = "\0".join((str(seed), *names))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56


def split_of(source_id: str, *, bench_share: float, seed: int = 0) -> str:
    """Return the split of everything cut from a source video: a function of its name, so no other video moves it.

    Args:
      bench_share: expected share of source videos in "bench"; raising it only moves videos from train to bench.
      seed: keep it fixed for the life of a data set.

    Raises:
      ValueError: bench_share outside [0, 1].
    """
    if not 0 <= bench_share <= 1:
        raise ValueError(f"bench_share must be within 0 and 1, not {bench_share}")
    return "bench" if fraction(seed, "split", source_id) < bench_share else "train"


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a data set is made of."""

    name: str  # of the preset
    shares: Mapping[str, float]  # weight per scenario; normalised over their sum
    per_source: int  # most questions from one source video
    total: int | None  # questions wanted; None for as many as the shares allow
    min_motion: float  # metres that camera or object must have moved between the frames
    split: str  # "train" or "bench"
    slack: float = 0.0  # accuracy above chance that knowing the classes' frequencies may give; 0: equal classes
    stretch: float = 1.0  # a scenario may have this many times its share where others have less; 1: exact shares

    def quotas(self, total: int, most: Mapping[str, int] | None = None) -> dict[str, int] | None:
        """Share out the questions per scenario of a data set of `total`; largest remainders get the rest.

        Args:
          most: questions that each scenario can have; what one is short of goes to the others, up to `stretch`.

        Returns:
          None when `total` cannot be reached.
        """
        most = dict.fromkeys(self.shares, total) if most is None else most
        # Where as much is wanted as there is, a scenario without questions does not keep the others from having some.
        shares = {name: share for name, share in self.shares.items() if most[name] or self.total is not None}
        whole = sum(shares.values())
        if not whole:
            return None
        room = {
            name: min(most[name], math.ceil(self.stretch * total * share / whole)) for name, share in shares.items()
        }
        full: dict[str, int] = {}
        while True:
            open_, rest = {n: s for n, s in shares.items() if n not in full}, total - sum(full.values())
            quotas = _largest_remainders(open_, rest)
            over = [name for name, quota in quotas.items() if quota > room[name]]
            if not over:
                return full | quotas if open_ or not rest else None
            if self.stretch == 1:
                return None
            full |= {name: room[name] for name in over}


def _largest_remainders(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Splits `total` in proportion to `weights`, in whole numbers."""
    whole = sum(weights.values())
    exact = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: (counts[n] - exact[n], n))[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


SLACK, STRETCH = 0.03, 3.0  # of training sets
# The paper's figures. R1-30k gives one share for both directions of the object; "significant 4D motion" is 0.5 m here.
_R1_SHARES = {
    "object_absolute_distance": 20.0,
    "camera_absolute_distance": 19.2,
    "camera_relative_direction": 16.7,
    "object_camera_absolute_distance": 19.2,
    "object_camera_relative_distance": 16.7,
    "object_camera_lateral_direction": 4.15,
    "object_camera_longitudinal_direction": 4.15,
}
_SUBTASK_SIZES = Counter(SUBTASKS[name] for name in SCENARIOS)  # two scenarios share one subtask
_BENCH_SHARES = {name: 1 / _SUBTASK_SIZES[SUBTASKS[name]] for name in SCENARIOS}
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("mllm4d_2m", dict.fromkeys(SCENARIOS, 1.0), 20, None, 0.0, "train", SLACK, STRETCH),
        Preset("r1_30k", _R1_SHARES, 20, 30_000, 0.5, "train", SLACK, STRETCH),
        Preset("bench", _BENCH_SHARES, 20, 6_000, 0.0, "bench"),
    )
}


class BalanceError(ValueError):
    """There are not enough questions of some class."""


def select(rows: Sequence[Mapping[str, Any]], preset: Preset, *, seed: int, bench_share: float) -> list[int]:
    """Choose the rows of a data set; the choice does not depend on the order of `rows`.

    Args:
      rows: with "id", "source_id", "question_type", "label", "rank", "options", "answer", "motion", "frames" as in
        `Question.record`; other fields are not read.
      seed: which of the equally good rows are taken.
      bench_share: see `split_of`. Rows of the other split are left out.

    Returns:
      Positions in `rows`, in the order of their ids.

    Raises:
      BalanceError: `preset.total` cannot be reached (says how many can), or nothing can be chosen.
      ValueError: an id occurs twice.
    """
    if len({row["id"] for row in rows}) != len(rows):
        twice = next(name for name, count in Counter(row["id"] for row in rows).items() if count > 1)
        raise ValueError(f"question id {twice!r} occurs more than once; ids must be unique in a data set")
    pool = _Pool.collect(rows, preset, seed, bench_share)
    most = pool.most() if preset.total is None else preset.total
    chosen = pool.choose(most)
    if not chosen:
        low, high = 0, most  # a data set of `low` can be made, one of `high` cannot
        while high - low > 1:
            middle = (low + high) // 2
            found = pool.choose(middle)
            low, high, chosen = (middle, high, found) if found else (low, middle, chosen)
        if preset.total is not None or not chosen:
            wanted = "some questions" if preset.total is None else f"{most} questions"
            raise BalanceError(
                f"preset {preset.name} wants {wanted} with even classes and at most {preset.per_source} of a video; "
                f"{len(rows)} on offer make {low}. Scarcest classes: {pool.scarce()}. Add clips of the {preset.split} "
                "split, or ask for fewer"
            )
    return sorted(chosen, key=lambda n: rows[n]["id"])


def gap_bin(frames: Mapping[str, Any], bins: int = 8) -> int:
    """Return which of `bins` equal ranges the share of the clip between both frames falls into."""
    i, j = frames["seen"]
    return min(bins - 1, (j - i - 1) * bins // max(frames["count"] - 1, 1))


def options_of(scenario: str) -> int:
    """Return how many options a question of the scenario has."""
    return min(len(LABELS[scenario]) or len(LETTERS), len(LETTERS))


def kinds_of(scenario: str) -> list[Any]:
    """Return the classes that balancing evens out: the labels, or the four ranks of a distance."""
    return list(LABELS[scenario]) or list(range(4))


def _size(options: Mapping[str, str]) -> float:
    """The smallest of the distances on offer, as a logarithm."""
    return math.log(max(min(map(float, options.values())), 0.05))


def _bins(values: Mapping[int, float], step: float, least: int) -> dict[int, int]:
    """Row -> number of its bin of values: at least `step` wide, and with at least `least` rows."""
    bins: dict[int, int] = {}
    first, held, number = -math.inf, 0, 0
    for n in sorted(values, key=values.__getitem__):  # ties in the order they come in
        if values[n] - first >= step and held >= least:
            number, held = number + 1, 0
        first, held = (values[n] if not held else first), held + 1
        bins[n] = number
    last = max(number - (held < least), 0)
    return {n: min(bin_, last) for n, bin_ in bins.items()}


Place = tuple[str, int, int]  # scenario, bin of gaps, bin of sizes within it


@dataclasses.dataclass(frozen=True)
class _Pool:
    """Rows in a random order that depends on seed and id, by scenario and bin, and by class."""

    preset: Preset
    cells: Mapping[Place, Mapping[Any, list[int]]]
    sources: Sequence[str]  # of every row
    letters: Sequence[str]

    @classmethod
    def collect(cls, rows: Sequence[Mapping[str, Any]], preset: Preset, seed: int, bench_share: float) -> _Pool:
        splits = {name: split_of(name, bench_share=bench_share) for name in {row["source_id"] for row in rows}}
        usable: dict[str, list[int]] = {scenario: [] for scenario in preset.shares}
        for n in sorted(range(len(rows)), key=lambda n: (fraction(seed, "select", rows[n]["id"]), rows[n]["id"])):
            row = rows[n]
            if row["question_type"] in usable and splits[row["source_id"]] == preset.split:
                if row["motion"] >= preset.min_motion:
                    usable[row["question_type"]].append(n)
        cells: dict[Place, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        for scenario, group in usable.items():
            labelled = bool(LABELS[scenario])
            gaps = _bins({n: gap_bin(rows[n]["frames"]) for n in group}, 1, _BIN_ROWS if labelled else _GAP_ROWS)
            for gap in sorted(set(gaps.values())):
                same = [n for n in group if gaps[n] == gap]
                sizes = {} if labelled else _bins({n: _size(rows[n]["options"]) for n in same}, _SIZE_STEP, _BIN_ROWS)
                for n in same:
                    kind = rows[n]["label"] if labelled else rows[n]["rank"]
                    cells[scenario, gap, sizes.get(n, 0)][kind].append(n)
        return cls(preset, cells, [row["source_id"] for row in rows], [row["answer"] for row in rows])

    def scarce(self) -> dict[str, str]:
        found = {}
        for scenario in self.preset.shares:
            sizes = {
                kind: sum(len(cell.get(kind, ())) for (name, *_), cell in self.cells.items() if name == scenario)
                for kind in kinds_of(scenario)
            }
            least = min(sizes, key=lambda kind: sizes[kind])
            found[scenario] = f"{least}: {sizes[least]}"
        return found

    def most(self) -> int:
        """Return how many can be chosen if no video had too many."""
        room = {name: _size_of(steps) for name, steps in self._steps(frozenset()).items()}
        low, high = 0, sum(room.values()) + 1  # a data set of `low` can be shared out, one of `high` cannot
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.preset.quotas(middle, room) else (low, middle)
        return low

    def choose(self, total: int) -> list[int]:
        """Choose the rows of a data set of `total`; [] when some class runs short."""
        left: set[int] = set()  # rows that are in the way because their video is used up
        while total:
            chosen, blocked = self._fill(total, left)
            if not blocked:
                return chosen
            left |= blocked
        return []

    def _fill(self, total: int, left: Set[int]) -> tuple[list[int], set[int]]:
        """`total` rows, none of `left`; or, if some class runs short, [] and those whose video was used up."""
        steps = self._steps(left)
        quotas = self.preset.quotas(total, {name: _size_of(found) for name, found in steps.items()})
        if quotas is None:
            return [], set()
        wanted: list[tuple[float, int, list[int], tuple]] = []  # (offered per wanted, wanted, offered, class)
        for scenario, quota in quotas.items():
            for (place, kind), count in _needs(steps[scenario], quota).items():
                offer = [n for n in self.cells[place][kind] if n not in left]
                wanted.append((len(offer) / count, count, offer, (scenario, kind)))
        wanted.sort(key=lambda entry: entry[0])  # scarce classes choose first, while no video is used up
        used: Counter[str] = Counter()
        right: dict[tuple, Counter[str]] = defaultdict(Counter)  # letters so far, by class
        chosen: list[int] = []
        blocked: set[int] = set()
        for _, count, offer, kind in wanted:
            taken, passed = self._take(offer, count, used, right[kind])
            chosen += taken
            blocked |= passed if len(taken) < count else set()
        return ([], blocked) if blocked else (chosen, blocked)

    def _steps(self, left: Set[int]) -> dict[str, list[Step]]:
        counts: dict[str, dict[Place, dict[Any, int]]] = {scenario: {} for scenario in self.preset.shares}
        for place in sorted(self.cells):
            cell = self.cells[place]
            counts[place[0]][place] = {kind: sum(n not in left for n in group) for kind, group in cell.items()}
        return {
            scenario: cap_steps(found, kinds_of(scenario), options_of(scenario), self.preset.slack)
            for scenario, found in counts.items()
        }

    def _take(
        self, offer: Sequence[int], count: int, used: Counter[str], right: Counter[str]
    ) -> tuple[list[int], set[int]]:
        """Up to `count` rows, rarest letter first, and those passed over for their video. Updates both counters."""
        queues: dict[str, list[int]] = {}
        for n in reversed(offer):  # popped from the end
            queues.setdefault(self.letters[n], []).append(n)
        taken: list[int] = []
        passed: set[int] = set()
        while len(taken) < count:
            letter = min((name for name, queue in queues.items() if queue), key=lambda k: (right[k], k), default=None)
            if letter is None:
                break
            n = queues[letter].pop()
            if used[self.sources[n]] >= self.preset.per_source:
                passed.add(n)
                continue
            used[self.sources[n]] += 1
            right[letter] += 1
            taken.append(n)
        return taken, passed


def _size_of(steps: Sequence[Step]) -> int:
    return sum(len(kinds) for _, kinds in steps)


def _needs(steps: Sequence[Step], quota: int) -> Counter[tuple[Place, Any]]:
    """(cell, class) -> rows to take: the first steps, of the last one as much as is left."""
    needs: Counter[tuple[Place, Any]] = Counter()
    for place, kinds in steps:
        rest = quota - needs.total()
        if rest <= 0:
            break
        spread = kinds if rest >= len(kinds) else kinds[:: len(kinds) // rest][:rest]  # not one axis of directions
        needs.update((place, kind) for kind in spread)
    return needs
