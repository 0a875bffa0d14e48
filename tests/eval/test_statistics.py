"""Intervals and tests against closed forms and against what they promise, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mllm4d_jax.eval.statistics import (
    Bootstrap,
    accuracy,
    detectable_difference,
    mcnemar,
    paired_difference,
)

SIZES, SHARES = (1, 2, 3, 4, 8), (0.3, 0.25, 0.2, 0.15, 0.1)  # questions per video


def draw_world(rng, videos, share=0.6):
    """(video of each question, chance of each video); answers about one video agree strongly (correlation 0.75)."""
    sizes = rng.choice(SIZES, size=videos, p=SHARES)
    return np.repeat(np.arange(videos), sizes), rng.beta(share / 3, (1 - share) / 3, videos)


def coverage(trials, videos, samples, seed):
    """Share of simulated benchmarks whose interval holds the true accuracy."""
    rng, hits = np.random.default_rng(seed), 0
    for trial in range(trials):
        index, chance = draw_world(rng, videos)
        found = accuracy(rng.random(len(index)) < chance[index], index, Bootstrap(samples, trial))
        hits += found.low <= 0.6 <= found.high
    return hits / trials


def false_positives(trials, videos, samples, seed):
    """Share of pairs of equally good models whose difference is called one."""
    rng, found = np.random.default_rng(seed), 0
    for trial in range(trials):
        index, chance = draw_world(rng, videos)
        own = rng.beta(0.2, 0.4 / 3, videos)  # half of the videos the second model sees in its own way
        other = np.where(rng.random(videos) < 0.5, chance, own)
        first, second = rng.random(len(index)) < chance[index], rng.random(len(index)) < other[index]
        change = paired_difference(first, second, index, Bootstrap(samples, trial))
        found += not change.low <= 0 <= change.high
    return found / trials


def test_coverage():
    assert 0.93 <= coverage(trials=1500, videos=80, samples=600, seed=1) <= 0.97


def test_paired_false_positives():
    assert false_positives(trials=1500, videos=80, samples=600, seed=2) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("videos", [20, 60, 200])
def test_coverage_and_false_positives_at_length(videos):
    assert 0.93 <= coverage(trials=4000, videos=videos, samples=1000, seed=3) <= 0.97
    assert false_positives(trials=4000, videos=videos, samples=1000, seed=4) <= 0.06


def test_drawing_questions_instead_of_videos_would_fail():
    """The simulation can tell: with every question a video of its own the interval is far too short."""
    rng, hits = np.random.default_rng(5), 0
    for trial in range(300):
        index, chance = draw_world(rng, 80)
        found = accuracy(rng.random(len(index)) < chance[index], np.arange(len(index)), Bootstrap(300, trial))
        hits += found.low <= 0.6 <= found.high
    assert hits / 300 < 0.88


def test_independent_answers_give_the_binomial_interval():
    correct = np.arange(1000) % 10 < 7
    found = accuracy(correct, np.arange(1000), Bootstrap(20000))
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert (found.value, found.n, found.clusters) == (0.7, 1000, 1000)
    assert found.low == pytest.approx(0.7 - half, abs=0.002) and found.high == pytest.approx(0.7 + half, abs=0.002)


def test_copies_of_a_question_add_nothing():
    correct = np.arange(200) % 5 < 3
    once = accuracy(correct, np.arange(200), Bootstrap(seed=7))
    copied = accuracy(np.repeat(correct, 6), np.repeat(np.arange(200), 6), Bootstrap(seed=7))
    assert (copied.value, copied.low, copied.high) == pytest.approx((once.value, once.low, once.high), abs=1e-12)
    assert copied.n == 1200 and copied.clusters == 200


def test_draws_are_seeded_and_blocks_do_not_matter(monkeypatch):
    from mllm4d_jax.eval import statistics

    correct, videos = np.arange(90) % 4 == 0, np.arange(90) // 3
    first = accuracy(correct, videos, Bootstrap(500, 1))
    assert first == accuracy(correct, videos, Bootstrap(500, 1))
    assert first != accuracy(correct, videos, Bootstrap(500, 2))
    monkeypatch.setattr(statistics, "_CELLS", 30 * 7)
    assert accuracy(correct, videos, Bootstrap(500, 1)).value == first.value
    assert accuracy(correct, videos, Bootstrap(500, 1)) == first


def test_edges():
    none = accuracy([], [])
    assert math.isnan(none.value) and none.n == none.clusters == 0
    one = accuracy([True, False], ["a", "a"])
    assert one.value == 0.5 and math.isnan(one.low) and one.clusters == 1
    right = accuracy([True] * 40, np.arange(40) // 2)
    assert (right.value, right.high) == (1.0, 1.0) and right.low == pytest.approx(0.025 ** (1 / 20))
    wrong = accuracy([False] * 20, range(20))
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    with pytest.raises(ValueError, match="3 clusters"):
        accuracy([True], ["a", "b", "c"])


def test_the_mean_over_groups():
    groups = np.repeat(["a", "b"], [90, 10])
    correct = np.concatenate([np.ones(90), np.arange(10) < 5]).astype(bool)
    found = accuracy(correct, np.arange(100), Bootstrap(seed=3), groups)
    assert found.value == 0.75
    half = 1.96 * math.sqrt(0.25 / 10) / 2  # only the second group varies, and it counts half
    assert found.low == pytest.approx(0.75 - half, abs=0.02) and found.high == pytest.approx(0.75 + half, abs=0.02)
    alone = accuracy(correct[:90], np.arange(90), groups=groups[:90])
    assert alone.value == 1.0 and alone.low == pytest.approx(0.025 ** (1 / 90))
    pairs = np.arange(100) // 2
    plain, macro = accuracy(correct, pairs), accuracy(correct, pairs, groups=np.full(100, "x"))
    assert (macro.value, macro.low, macro.high) == pytest.approx((plain.value, plain.low, plain.high), abs=1e-12)
    with pytest.raises(ValueError, match="2 groups for 3"):
        accuracy([True, True, False], range(3), groups=["a", "b"])


def test_groups_with_weights_are_a_mean_of_means():
    """Two tasks, one of them in three levels: the levels count a third of a half each."""
    scores, levels = [1.0, 0.0, 0.5, 1.0, 0.0, 0.25], ["a", "a", "b", "x", "y", "z"]
    weights = {"a": 1 / 2, "b": 1 / 2, "x": 1 / 3, "y": 1 / 3, "z": 1 / 3}
    found = accuracy(scores, range(6), groups=levels, weights=weights)
    assert found.value == pytest.approx((0.5 / 2 + 0.5 / 2 + 1.25 / 3) / 2) and found.low < found.value < found.high
    alone = accuracy(scores, ["v"] * 6, groups=levels, weights=weights)
    assert alone.value == pytest.approx(found.value) and np.isnan(alone.low)


def test_scores_between_wrong_and_right():
    found = paired_difference([0.5, 0.2, 1.0], [1.0, 0.2, 0.7], range(3))
    assert found.value == pytest.approx(0.2 / 3)


def test_a_paired_difference():
    rng = np.random.default_rng(0)
    first = rng.random(600) < 0.5
    second = first.copy()
    second[:60] = True  # better on 60 of 600
    found = paired_difference(first, second, np.arange(600))
    gain = (second.astype(float) - first).mean()
    half = 1.96 * (second.astype(float) - first).std() / math.sqrt(600)
    assert found.value == pytest.approx(gain) and found.low > 0
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    apart = accuracy(first, np.arange(600)).high - accuracy(first, np.arange(600)).low
    assert found.high - found.low < apart, "pairing must pay"
    back = paired_difference(second, first, np.arange(600))
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=0.003)


def test_equal_runs_differ_by_nothing():
    found = paired_difference([True, False] * 50, [True, False] * 50, range(100))
    assert found.value == 0 and found.low == -found.high and found.high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert mcnemar([True, False], [True, False]) == (0, 0, 1.0)
    assert math.isnan(paired_difference([True], [False], ["a"]).low)
    with pytest.raises(ValueError, match="question by question"):
        paired_difference([True], [True, False], ["a"])


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 0.0625),
        (1, 7, 0.0703125),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (20, 5, 0.004077315330505371),
    ],
)
def test_mcnemar_is_the_exact_sign_test(lost, won, p):
    first = [True] * lost + [False] * won + [True, False] * 3
    second = [False] * lost + [True] * won + [True, False] * 3
    assert mcnemar(first, second) == (lost, won, pytest.approx(p, rel=1e-12))


def test_mcnemar_of_thousands():
    *_, p = mcnemar([True] * 4000 + [False] * 4100, [False] * 4000 + [True] * 4100)
    z = (100 - 1) / math.sqrt(8100)  # normal approximation with the continuity correction
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_the_detectable_difference_is_found_in_80_of_100_cases():
    rng, videos, found, claimed = np.random.default_rng(8), 150, 0, []
    index = np.repeat(np.arange(videos), 3)
    for trial in range(400):
        first = rng.random(len(index)) < 0.5
        # Better by 0.24 * (0.69 - 0.5) = 0.0456, and the standard error of that is 0.0162.
        second = np.where(rng.random(len(index)) < 0.24, rng.random(len(index)) < 0.69, first)
        claimed.append(detectable_difference(first, second, index))
        change = paired_difference(first, second, index, Bootstrap(400, trial))
        found += change.low > 0
    assert np.mean(claimed) == pytest.approx(0.0456, abs=0.001)
    assert found / 400 == pytest.approx(0.8, abs=0.06)
    assert math.isnan(detectable_difference([True], [False], ["a"]))


@pytest.mark.parametrize(("videos", "quantile"), [(2, 12.7062047362), (4, 3.1824463053), (11, 2.2281388520)])
def test_few_videos_take_students_t_exactly(videos, quantile):
    change = np.arange(videos) % 2 == 0  # one question per video: the standard error is that of a plain mean
    error = (change * 1.0).std(ddof=1) / math.sqrt(videos)
    found = detectable_difference([False] * videos, change, range(videos))
    assert found == pytest.approx((quantile + 0.8416212336) * error, rel=1e-9)


def test_equal_changes_everywhere_leave_room_for_exceptions():
    found = paired_difference([False] * 20, [True] * 20, range(20))
    assert (found.value, found.high) == (1, 1) and found.low == pytest.approx(0.025 ** (1 / 20))
