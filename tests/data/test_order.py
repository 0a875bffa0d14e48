"""The order of questions: complete epochs, groups of one clip, mixtures, all from seed and position alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mllm4d_jax.data.order import BLOCK, Order, OrderError, even_order

CLIPS = np.array([0, 0, 1, 0, 2, 0, 0, 1, 3, 0, 0], np.int32)  # clip 0 has seven questions, 1 two, 2 and 3 one


def take(order, start, count):
    return [order[p] for p in range(start, start + count)]


@pytest.mark.parametrize("per_group", [1, 2, 3, 20])
def test_an_epoch_takes_every_question_once_in_groups_of_a_clip(per_group):
    order = Order([CLIPS], [1.0], per_group=per_group, seed=3)
    groups = order.sources[0].groups
    assert groups == sum(-(-n // per_group) for n in (7, 2, 1, 1))
    for epoch in range(3):
        taken = take(order, epoch * groups, groups)
        assert sorted(i for q in taken for i in q.indices) == list(range(len(CLIPS)))
        for q in taken:
            assert len({CLIPS[i] for i in q.indices}) == 1 and len(q.indices) <= per_group
    assert order.questions_until(5 * groups) == 5 * len(CLIPS)


def test_epochs_and_seeds_differ_in_order_and_in_grouping():
    clips = np.repeat(np.arange(6), 8)
    epochs = []
    for seed in range(3):
        order = Order([clips], [1.0], per_group=4, seed=seed)
        epochs += [tuple(take(order, e * 12, 12)) for e in range(2)]
    # With seed + epoch as Grain has it, one seed's second epoch would be the next seed's first.
    assert len(set(epochs)) == 6
    assert len({frozenset(frozenset(q.indices) for q in epoch) for epoch in epochs}) == 6


def test_positions_need_no_history():
    sources = [CLIPS, np.repeat(np.arange(40), 3)]
    one, two = (Order(sources, [0.3, 0.7], per_group=2, seed=7) for _ in range(2))
    straight = take(one, 0, 2200)
    for position in (2199, 0, 1777, 1001, 999):
        assert two[position] == straight[position]


def test_a_mixture_keeps_its_rates_and_repeats_small_sources():
    rates = [0.7, 0.25, 0.05]
    sources = [np.arange(5000), np.arange(40), np.arange(10)]
    order = Order(sources, rates, per_group=1, seed=1)
    taken = take(order, 0, 3 * BLOCK)
    for b in range(3):
        counts = Counter(q.source for q in taken[b * BLOCK : (b + 1) * BLOCK])
        assert counts == {0: 700, 1: 250, 2: 50}
    for length in (100, 300, 1500):  # within a block too, as even as a shuffle is
        share = np.bincount([q.source for q in taken[:length]], minlength=3) / length
        assert np.all(np.abs(share - rates) < 4 * np.sqrt(np.array(rates) / length))
    small = [q.indices[0] for q in taken if q.source == 1]
    for epoch in range(len(small) // 40):
        assert sorted(small[40 * epoch : 40 * epoch + 40]) == list(range(40))
    assert small[:40] != small[40:80]
    np.testing.assert_allclose(order.questions_until(2000), 2000)


def test_sources_of_equal_size_do_not_share_an_order():
    order = Order([np.arange(50)] * 2, [0.5, 0.5], per_group=1, seed=0)
    taken = take(order, 0, 400)
    first, second = ([q.indices for q in taken if q.source == n][:50] for n in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_steps_hold_about_as_many_questions_each():
    """Clips of 1 to 20 questions: those of a step of eight vary less than a fifth of what eight clips at random do."""
    rng = np.random.default_rng(0)
    clips = np.repeat(np.arange(2000), rng.integers(1, 21, 2000))
    order = Order([clips], [1.0], per_group=20, seed=0)
    counts = np.array([len(order[p].indices) for p in range(order.sources[0].groups)])
    steps = counts.reshape(-1, 8).sum(1)
    assert steps.std() < 0.2 * counts.std() * np.sqrt(8)
    shifted = counts[3:-5].reshape(-1, 8).sum(1)  # steps need not begin where windows do
    assert shifted.std() < 0.6 * counts.std() * np.sqrt(8)
    # Large and small ones are in every place of a step alike.
    means = counts.reshape(-1, 8).mean(0)
    assert np.abs(means - counts.mean()).max() < 4 * counts.std() / np.sqrt(len(steps))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 61, 64])
def test_an_even_order_is_a_permutation(size):
    orders = [even_order(np.arange(size), np.random.default_rng(seed)) for seed in range(200)]
    assert all(sorted(o) == list(range(size)) for o in orders)
    if size in (8, 64):
        for order in orders[:20]:
            for part in (2, 4, 8):  # of `part` neighbours there is one of each `part`-th
                assert all(sorted(x) == list(range(part)) for x in (order.reshape(-1, part) * part // size))
        first = np.bincount([o[0] for o in orders], minlength=size)
        assert (first > 0).sum() >= min(size, 50)  # each item can come first


def test_settings_that_cannot_work():
    with pytest.raises(OrderError, match="less than one group in 1000"):
        Order([CLIPS, CLIPS], [0.9999, 0.0001], per_group=1, seed=0)
    with pytest.raises(OrderError, match="at least one question"):
        Order([CLIPS], [1.0], per_group=0, seed=0)
