"""Advantages, dead groups, dynamic sampling and the soft punishment of long completions."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm4d_jax.grpo.advantages import (
    DEAD_SPREAD,
    group_advantages,
    group_statistics,
    informative,
    soft_overlong,
)
from tests.grpo.objective_cases import PLAIN, reference_advantages


def make_groups(seed: int = 0):
    """Rewards and groups of 6 prompts with 1 to 7 completions in mixed order, and 3 filling rows."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([3, 0, 12, 5, 90, 4, -1], [7, 4, 3, 2, 1, 5, 3])
    groups = rng.permutation(groups).astype(np.int32)
    rewards = rng.uniform(0, 1, len(groups)).astype(np.float32)
    rewards[groups == 4] = 0.1
    rewards[groups < 0] = np.nan
    return rewards, groups


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale, ddof, seed):
    rewards, groups = make_groups(seed)
    spec = PLAIN | dict(scale=scale, ddof=ddof, std_eps=1e-4)
    out, dead = jax.jit(group_advantages, static_argnames=("scale", "ddof"))(rewards, groups, scale=scale, ddof=ddof)
    np.testing.assert_allclose(out, reference_advantages(rewards, groups, spec), rtol=1e-6, atol=1e-6)
    assert (float(dead.total), float(dead.weight)) == (2, 6)  # the equal rewards, and the group of one


def test_statistics_by_hand():
    rewards, groups = np.array([1, 5, 2, 9, 7], np.float32), np.array([8, 1, 8, -1, -1], np.int32)
    stats = group_statistics(rewards, groups, 1)
    np.testing.assert_allclose(stats.centered, [-0.5, 0, 0.5, 0, 0])
    np.testing.assert_allclose(stats.std, [0.5**0.5, 0, 0.5**0.5, 0, 0], rtol=1e-6)
    assert stats.dead.tolist() == [False, True, False, True, True]
    assert stats.first.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("size", [2, 8, 12])
def test_a_group_of_equal_rewards_is_exactly_zero(size):
    """Means of equal float32 numbers are not equal to them; divided by their own size such residues are of order 1."""
    for value in np.random.default_rng(1).uniform(0, 1, 200).astype(np.float32):
        out, _ = group_advantages(np.full(size, value), np.zeros(size, np.int32), scale="group", eps=1e-8)
        assert not np.any(out)


def test_the_dead_group_rule_has_its_threshold_where_it_says():
    groups = np.zeros(3, np.int32)
    for spread, alive in ((0.9 * DEAD_SPREAD, False), (1.2 * DEAD_SPREAD, True)):
        rewards = np.array([0, spread, 0], np.float32)
        out, dead = group_advantages(rewards, groups, scale="none")
        assert np.any(out) == alive and bool(dead.total) != alive and bool(informative(rewards, groups).all()) == alive


def test_close_rewards_keep_their_differences():
    rewards = (0.9 + 1e-5 * np.arange(4)).astype(np.float32)
    out, _ = group_advantages(rewards, np.zeros(4, np.int32), scale="group", eps=1e-8)
    exact = rewards.astype(np.float64)
    np.testing.assert_allclose(out, (exact - exact.mean()) / (exact.std(ddof=1) + 1e-8), rtol=1e-5)


def test_dynamic_sampling_keeps_what_differs():
    rewards = np.array([1, 0, 1, 1, 1, 0.4, 0.2], np.float32)
    groups = np.array([5, 5, 6, 6, 6, 7, -1], np.int32)
    assert informative(rewards, groups).tolist() == [True, True, False, False, False, False, False]


def test_soft_overlong_is_the_slope_of_dapo():
    """Its three cases written out: free, slope, full."""
    lengths, cap, cache = np.arange(0, 30), 20, 8

    def punishment(n):
        if n <= cap - cache:
            return 0.0
        return ((cap - cache) - n) / cache if n <= cap else -1.0

    wanted = [punishment(n) for n in lengths]
    np.testing.assert_allclose(soft_overlong(lengths, cap, cache), wanted, atol=1e-7)
    np.testing.assert_allclose(soft_overlong(lengths, cap, cache, 0.25), 0.25 * np.array(wanted), atol=1e-7)


@pytest.mark.parametrize("cache", [0, 21])
def test_a_cache_that_does_not_fit_is_refused(cache):
    with pytest.raises(ValueError, match="does not fit a cap of 20"):
        soft_overlong(np.arange(3), 20, cache)


def test_unknown_scale():
    with pytest.raises(ValueError, match="known: group, batch, none"):
        group_advantages(np.zeros(2), np.zeros(2, np.int32), scale="median")


REWARDS = st.floats(-1e15, 1e15, allow_subnormal=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(REWARDS, st.integers(-1, 3)), min_size=9, max_size=9), st.sampled_from(["group", "batch"]))
def test_any_rewards(rows, scale):
    """Finite, of bounded size, and sum 0 in every group scaled by its own deviation."""
    rewards = np.array([r for r, _ in rows], np.float32)
    groups = np.array([g for _, g in rows], np.int32)
    out = np.asarray(group_advantages(rewards, groups, scale=scale)[0])
    assert np.all(np.isfinite(out)) and np.all(out[groups < 0] == 0)
    if scale == "group":
        assert np.abs(out).max() <= 3  # (n - 1) / sqrt(n) at most
        for group in range(4):
            assert abs(out[groups == group].sum()) < 1e-5
