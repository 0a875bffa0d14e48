"""Choosing questions: shares per scenario, equal classes, few questions per video, one split per source video.

Classes are made equal so that knowing how often each answer occurs is worth nothing: labels separately for short and
long stretches of frames (otherwise "not moving" follows from two frame numbers that are close together), ranks of the
true distance separately for small and large distances (otherwise, where large ones are rare, the smaller options are
the better guess). The scarcest class therefore decides how much can be used. Among equally good questions those whose
right letter is rarer so far come first, so that letters are even too and not only on average.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.questions.propose import SCENARIOS
from data_prep.scenes.relations import LABELS
from mllm4d_jax.qa.benchmarks import SUBTASKS

_SIZE_STEP = 0.1  # width of a bin of sizes, in the natural logarithm
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

    def quotas(self, total: int) -> dict[str, int]:
        """Share out the questions per scenario of a data set of `total`; largest remainders get the rest."""
        weight = sum(self.shares.values())
        exact = {name: total * share / weight for name, share in self.shares.items()}
        quotas = {name: int(value) for name, value in exact.items()}
        for name in sorted(exact, key=lambda n: (quotas[n] - exact[n], n))[: total - sum(quotas.values())]:
            quotas[name] += 1
        return quotas


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
        Preset("mllm4d_2m", dict.fromkeys(SCENARIOS, 1.0), 20, None, 0.0, "train"),
        Preset("r1_30k", _R1_SHARES, 20, 30_000, 0.5, "train"),
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
    most = len(rows) if preset.total is None else preset.total
    chosen = pool.fill(most)
    if chosen is None:
        low, high = 0, most  # a data set of `low` can be made, one of `high` cannot
        best: list[int] = []
        while high - low > 1:
            middle = (low + high) // 2
            found = pool.fill(middle)
            if found is None:
                high = middle
            else:
                low, best = middle, found
        if preset.total is not None or not best:
            raise BalanceError(
                f"preset {preset.name} wants {most} questions with equal classes and at most {preset.per_source} of a "
                f"video; {len(rows)} on offer make {low}. Scarcest classes: {pool.scarce()}. Add clips of the "
                f"{preset.split} split, or ask for fewer"
            )
        chosen = best
    return sorted(chosen, key=lambda n: rows[n]["id"])


def gap_bin(frames: Mapping[str, Any], bins: int = 8) -> int:
    """Return which of `bins` equal ranges the share of the clip between both frames falls into."""
    i, j = frames["seen"]
    return min(bins - 1, (j - i - 1) * bins // max(frames["count"] - 1, 1))


def _kinds(scenario: str) -> list[Any]:
    """The classes that must be equally frequent: the labels, or the four ranks of a distance."""
    return list(LABELS[scenario]) or list(range(4))


def _size_bin(options: Mapping[str, str]) -> int:
    """Which range of sizes the smallest of the distances on offer falls into."""
    return math.floor(math.log(max(min(map(float, options.values())), 0.05)) / _SIZE_STEP)


@dataclasses.dataclass(frozen=True)
class _Pool:
    """Rows in a random order that depends on seed and id, by (scenario, bin of gaps or sizes) and class."""

    preset: Preset
    cells: Mapping[tuple[str, int], Mapping[Any, list[int]]]
    sources: Sequence[str]  # of every row
    letters: Sequence[str]

    @classmethod
    def collect(cls, rows: Sequence[Mapping[str, Any]], preset: Preset, seed: int, bench_share: float) -> _Pool:
        splits = {name: split_of(name, bench_share=bench_share) for name in {row["source_id"] for row in rows}}
        cells: dict[tuple[str, int], dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        for n in sorted(range(len(rows)), key=lambda n: fraction(seed, "select", rows[n]["id"])):
            row, scenario = rows[n], rows[n]["question_type"]
            if scenario not in preset.shares or splits[row["source_id"]] != preset.split:
                continue
            if row["motion"] < preset.min_motion:
                continue
            if LABELS[scenario]:
                cells[scenario, gap_bin(row["frames"])][row["label"]].append(n)
            else:
                cells[scenario, _size_bin(row["options"])][row["rank"]].append(n)
        return cls(preset, cells, [row["source_id"] for row in rows], [row["answer"] for row in rows])

    def scarce(self) -> dict[str, str]:
        found = {}
        for scenario in self.preset.shares:
            sizes = {
                kind: sum(len(cell.get(kind, ())) for (name, _), cell in self.cells.items() if name == scenario)
                for kind in _kinds(scenario)
            }
            least = min(sizes, key=lambda kind: sizes[kind])
            found[scenario] = f"{least}: {sizes[least]}"
        return found

    def fill(self, total: int) -> list[int] | None:
        """Choose the rows of a data set of `total`; None when some class runs short."""
        wanted: list[tuple[float, int, list[int], tuple]] = []  # (offered per wanted, wanted, offered, class)
        for scenario, quota in self.preset.quotas(total).items():
            needs = self._needs(scenario, quota)
            if needs is None:
                return None
            for (place, kind), count in needs.items():
                offer = self.cells[place][kind]
                wanted.append((len(offer) / count, count, offer, (scenario, kind)))
        wanted.sort(key=lambda entry: entry[0])  # scarce classes choose first, while no video is used up
        used: Counter[str] = Counter()
        right: dict[tuple, Counter[str]] = defaultdict(Counter)  # letters so far, by class
        chosen: list[int] = []
        for _, count, offer, kind in wanted:
            taken = self._take(offer, count, used, right[kind])
            if taken is None:
                return None
            chosen += taken
        return chosen

    def _take(self, offer: Sequence[int], count: int, used: Counter[str], right: Counter[str]) -> list[int] | None:
        """`count` rows of those on offer, rarest letter first; None if they do not suffice. Updates both counters."""
        queues: dict[str, list[int]] = {}
        for n in reversed(offer):  # popped from the end
            queues.setdefault(self.letters[n], []).append(n)
        taken: list[int] = []
        while len(taken) < count:
            letter = min((name for name, queue in queues.items() if queue), key=lambda k: (right[k], k), default=None)
            if letter is None:
                return None
            n = queues[letter].pop()
            if used[self.sources[n]] < self.preset.per_source:
                used[self.sources[n]] += 1
                right[letter] += 1
                taken.append(n)
        return taken

    def _needs(self, scenario: str, quota: int) -> dict[tuple[tuple[str, int], Any], int] | None:
        """(cell, class) -> rows to take: equal over classes in each bin, bins by what they can give."""
        kinds = _kinds(scenario)
        places = [place for place in sorted(self.cells) if place[0] == scenario]
        room = {place: min(len(self.cells[place].get(kind, ())) for kind in kinds) for place in places}
        each, extra = divmod(quota, len(kinds))
        if sum(room.values()) < each:
            return None
        counts = _proportional(room, each)
        needs = {(place, kind): count for place, count in counts.items() for kind in kinds if count}
        # What does not divide evenly: one more of some classes, spread over the list of classes.
        for kind in kinds[:: max(1, len(kinds) // extra)][:extra] if extra else ():
            spare = [p for p in places if len(self.cells[p].get(kind, ())) > counts[p]]
            if not spare:
                return None
            place = max(spare, key=lambda p: (len(self.cells[p][kind]) - counts[p], p))
            needs[place, kind] = needs.get((place, kind), 0) + 1
        return needs


def _proportional(room: Mapping[Any, int], total: int) -> dict[Any, int]:
    """Splits `total` in proportion to `room`, never above it; total <= the sum of room."""
    whole = sum(room.values())
    counts = {place: total * size // whole if whole else 0 for place, size in room.items()}
    for place in sorted(room, key=lambda p: (counts[p] - room[p], p)):
        if sum(counts.values()) == total:
            break
        counts[place] += 1
    return counts
