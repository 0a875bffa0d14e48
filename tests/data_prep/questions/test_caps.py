"""Caps on classes: the bound against enumeration, the yield against linear programming, and readers of skewed data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from scipy.optimize import linprog

from data_prep.questions.balance import PRESETS, Preset, gap_bin, select
from data_prep.questions.blind import NO_GUESSER, baselines, screen
from data_prep.questions.caps import cap_steps, expected_accuracy
from data_prep.questions.options import LETTERS, label_options, numeric_options
from data_prep.questions.scenarios import SCENARIOS
from data_prep.scenes.relations import LABELS
from mllm4d_jax.qa.benchmarks import SUBTASKS

SHAPES = ((6, 4), (4, 4), (3, 3), (5, 2))  # classes, options


def kept(steps) -> dict:
    counts: dict = {}
    for place, kinds in steps:
        counts.setdefault(place, Counter()).update(kinds)
    return counts


def enumerated(counts, classes: int, offered: int) -> float:
    """Accuracy of answering with the offered class that is most frequent in the context, over all sets of options."""
    right = 0.0
    for found in counts.values():
        for true in range(classes):
            sets = list(itertools.combinations([k for k in range(classes) if k != true], offered - 1))
            # Ties go to the class of the lower number: some rule that does not know the answer.
            best = [max((true, *others), key=lambda k: (found.get(k, 0), -k)) for others in sets]
            right += found.get(true, 0) * best.count(true) / len(sets)
    return right / sum(sum(found.values()) for found in counts.values())


@pytest.mark.parametrize(("classes", "offered"), SHAPES)
@pytest.mark.parametrize("slack", [0.0, 0.03, 0.1])
def test_every_beginning_is_within_the_bound(classes, offered, slack):
    rng = random.Random(classes)
    for _ in range(20):
        frequent = rng.randrange(classes)
        counts = {
            place: {k: rng.randrange(1 + (40 if k == frequent else 6)) for k in range(classes)} for place in range(4)
        }
        assert expected_accuracy(counts, classes, offered) == pytest.approx(enumerated(counts, classes, offered))
        steps = cap_steps(counts, range(classes), offered, slack)
        for end in {1, len(steps) // 2, len(steps)} - {0} if steps else ():
            taken = kept(steps[:end])
            last = (not slack and end == len(steps)) / sum(len(kinds) for _, kinds in steps[:end])  # one question
            assert enumerated(taken, classes, offered) <= 1 / offered + slack + last + 1e-9
            assert all(n <= counts[place][k] for place, found in taken.items() for k, n in found.items())
        if not slack:
            least = {place: min(found.values()) for place, found in counts.items()}
            more = [n - least[place] for place, found in kept(steps).items() for n in found.values()]
            assert set(more) <= {0, 1} and sum(more) < classes
            assert all(kept(steps)[place][k] >= n for place, n in least.items() if n for k in range(classes))


@pytest.mark.parametrize(("classes", "slack"), [(3, 0.03), (4, 0.03), (3, 0.1)])
def test_hardly_more_could_be_kept(classes, slack):
    """Where all classes are offered, the best choice of counts is a linear program."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        counts = rng.poisson(rng.uniform(1, 30, (5, classes)))
        places = len(counts)
        # Variables: kept questions, then the largest class of each context; hits - allowed <= 0, kept - largest <= 0.
        gain = np.r_[-np.ones(counts.size), np.zeros(places)]
        bound = np.r_[np.full(counts.size, -(1 / classes + slack)), np.ones(places)]
        above = np.hstack([np.eye(counts.size), -np.repeat(np.eye(places), classes, axis=0)])
        limits = [(0, n) for n in counts.ravel()] + [(0, None)] * places
        best = -linprog(gain, np.vstack([bound, above]), np.zeros(1 + counts.size), bounds=limits).fun
        steps = cap_steps(
            {n: dict(enumerate(row.tolist())) for n, row in enumerate(counts)}, range(classes), classes, slack
        )
        got = sum(len(kinds) for _, kinds in steps)
        assert best - classes <= got <= best + 1e-6


def skewed_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of a source whose answers follow from habits: 90 % one label, which one by the gap, and short distances."""
    rng = random.Random(seed)
    rows: list[dict] = []
    while len(rows) < count:
        scenario = SCENARIOS[len(rows) % len(SCENARIOS)]
        first = rng.randrange(28)
        second = rng.randrange(first + 1, 32)
        labels = LABELS[scenario]
        if labels:
            usual = labels[-1] if second - first < 8 else "forward" if "forward" in labels else labels[0]
            label = usual if rng.random() < 0.9 else rng.choice(labels)
            rank, truth, texts = -1, label, label_options(labels, label, rng)
        else:
            made = numeric_options(0.6 * math.exp(rng.expovariate(6 if second - first < 8 else 3)), "exchangeable", rng)
            if made is None:
                continue
            texts, rank = made
            label, truth = "", texts[rank]
            rng.shuffle(texts)
        rows.append(
            {
                "id": f"{len(rows)}",
                "source_id": f"video{rng.randrange(count // 12)}",
                "question_type": scenario,
                "subtask": SUBTASKS[scenario],
                "template": f"{rng.randrange(5)}.{rng.randrange(4)}",
                "label": label,
                "rank": rank,
                "options": dict(zip(LETTERS, texts, strict=False)),
                "answer": LETTERS[texts.index(truth)],
                "motion": 1.0,
                "frames": {"seen": [first, second], "count": 32},
            }
        )
    return rows


def features(row) -> list[list]:
    """Of each option: what it is, alone and together with gap, phrasing, the set on offer and its size."""
    texts = list(row["options"].values())
    labelled = bool(row["label"])
    order = sorted(texts, key=None if labelled else float)
    small = "" if labelled else round(math.log(float(order[0])) / 0.3)
    described = []
    for letter, text in row["options"].items():
        what = text if labelled else order.index(text)
        size = text if labelled else round(math.log(float(text)) / 0.3)
        gap = gap_bin(row["frames"])
        described.append(
            [("what", what), ("size", size), ("gap", gap, what), ("short", gap < 2, size), ("letter", letter)]
            + [("said", row["template"][0], what), ("small", small, what), ("set", *(order if labelled else ()), what)]
        )
    return described


def naive_bayes(learn, score) -> float:
    """Accuracy of adding up, over an option's features, how much more often they go with the truth."""
    true, shown = Counter(), Counter()
    for row in learn:
        for letter, described in zip(row["options"], features(row), strict=True):
            shown.update(described)
            true.update(described if letter == row["answer"] else ())
    right = 0
    for row in score:
        chance = 1 / len(row["options"])
        sums = [
            sum(math.log((true[key] + 4 * chance) / (shown[key] + 4)) for key in described)
            for described in features(row)
        ]
        right += list(row["options"])[int(np.argmax(sums))] == row["answer"]
    return right / len(score)


def logistic(learn, score) -> float:
    """Accuracy of a conditional logit over the same features: 60 gradient steps with weight decay."""
    index: dict = {}
    for row in learn:
        for described in features(row):
            for key in described:
                index.setdefault(key, len(index))

    def encode(rows):
        described = [features(row) for row in rows]
        ids = np.array([[[index.get(key, len(index)) for key in option] for option in each] for each in described])
        return ids, np.array([list(row["options"]).index(row["answer"]) for row in rows])

    ids, truth = encode(learn)
    weights = np.zeros(len(index) + 1)
    for _ in range(60):
        logits = weights[ids].sum(2)
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        chances[np.arange(len(ids)), truth] -= 1
        slope = np.zeros_like(weights)
        np.add.at(slope, ids, np.repeat(chances[..., None], ids.shape[2], axis=2))
        weights -= 8 * (slope / len(ids) + 1e-3 * weights)
        weights[-1] = 0
    ids, truth = encode(score)
    return float((weights[ids].sum(2).argmax(1) == truth).mean())


def gains(rows, seed: int = 0) -> dict[str, float]:
    """Best accuracy above chance per scenario of the two combining readers, mean over both halves."""
    found = {}
    for scenario in SCENARIOS:
        group = [row for row in rows if row["question_type"] == scenario]
        half = {name: random.Random(f"{seed} {name}").random() < 0.5 for name in {row["source_id"] for row in group}}
        folds = [[row for row in group if half[row["source_id"]] == side] for side in (False, True)]
        chance = 1 / len(group[0]["options"])
        found[scenario] = max(
            sum(guess(a, b) * len(b) for a, b in (folds, folds[::-1])) / len(group) - chance
            for guess in (naive_bayes, logistic)
        )
    return found


def test_readers_of_skewed_data_get_nothing_from_what_is_kept():
    rows = skewed_rows(7_000)
    before = gains(rows)  # there is something to find
    assert min(before.values()) > 0.15 and before["camera_relative_direction"] > 0.5
    chosen = [rows[n] for n in select(rows, PRESETS["mllm4d_2m"], seed=0, bench_share=0.0)]
    out = screen(chosen, 0.03)
    final = [row for row in chosen if row["id"] not in out]
    sizes = Counter(row["question_type"] for row in final)
    assert len(out) < 0.02 * len(chosen) and min(sizes[name] for name in SCENARIOS) >= 50
    strict = dataclasses.replace(PRESETS["mllm4d_2m"], slack=0.0, stretch=1.0)
    assert len(final) > 4 * len(select(rows, strict, seed=0, bench_share=0.0))
    assert max(gains(final).values()) <= 0.05
    for scenario, figures in baselines(final, 5, "question_type").items():  # other halves than those screened with
        found = {name: value - figures["chance"] for name, value in figures.items() if name not in NO_GUESSER}
        assert max(found.values()) <= 0.05, (scenario, found)


def test_screening_ends_what_no_context_shows():
    """A habit that balancing does not look at: the phrasing tells the label."""
    rows = [row for row in skewed_rows(2_000, 1) if row["question_type"] == "object_camera_lateral_direction"]
    rng = random.Random(0)
    for row in rows:
        told = LABELS[row["question_type"]].index(row["label"])
        row["template"] = f"{told if rng.random() < 0.5 else rng.randrange(5)}.0"
    kept_rows = [rows[n] for n in select(rows, _wide("object_camera_lateral_direction"), seed=0, bench_share=0.0)]
    told = baselines(kept_rows, 0, "question_type")["object_camera_lateral_direction"]
    assert told["template_prior"] > told["chance"] + 0.05
    out = screen(kept_rows, 0.03)
    final = [row for row in kept_rows if row["id"] not in out]
    after = baselines(final, 0, "question_type")["object_camera_lateral_direction"]
    assert 0 < len(out) < len(kept_rows) and screen(final, 0.03) == set()
    assert max(value for name, value in after.items() if name not in NO_GUESSER) <= after["chance"] + 0.03


def _wide(scenario: str) -> Preset:
    return Preset("p", {scenario: 1.0}, 20, None, 0.0, "train", 0.03, 2.0)
