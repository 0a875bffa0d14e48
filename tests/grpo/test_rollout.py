"""Completions as host records: storable to the bit, divisible, joinable, and readable by the objective."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mllm4d_jax.grpo.rollout import Rollouts


def rollouts(rewards=(0.1, 0.2, 0.5, 0.5), longest=3, step=4, seed=0):
    rng, count = np.random.default_rng(seed), len(rewards)
    lengths = rng.integers(1, longest + 1, count).astype(np.int32)
    lengths[0] = longest
    return Rollouts(
        step=step,
        policy_step=step - 1,
        positions=tuple(range(7, 7 + count // 2)),
        position=40,
        rejected=2,
        tokens=rng.integers(0, 99, (count, longest)).astype(np.int32),
        lengths=lengths,
        logprobs=rng.normal(size=(count, longest)).astype(np.float32),
        finish=tuple("length" if n == longest else "stop" for n in lengths),
        texts=tuple(f"text {i} \N{GRINNING FACE}" for i in range(count)),
        rewards=tuple({"total": r, "accuracy": 1.0} for r in rewards),
        seconds={"decode": 1.5},
        counts={"decode_steps": 3},
    )


def same(a, b):
    for name in ("tokens", "lengths", "logprobs"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    for name in ("step", "policy_step", "positions", "position", "rejected", "finish", "texts", "rewards", "seconds"):
        assert getattr(a, name) == getattr(b, name), name


def test_the_way_through_json_keeps_every_bit():
    before = rollouts()
    same(Rollouts.from_json(json.loads(json.dumps(before.to_json()))), before)


def test_the_batch_holds_what_the_objective_needs():
    found = rollouts()
    batch = found.batch(5)
    np.testing.assert_array_equal(batch.mask.sum(1), found.lengths)
    assert batch.groups.tolist() == [0, 0, 1, 1] and batch.tokens.shape == (4, 5)
    np.testing.assert_array_equal(batch.truncated, found.lengths == 3)
    np.testing.assert_array_equal(batch.old_logprobs[:, :3], found.logprobs)
    with pytest.raises(ValueError, match="3 tokens does not fit arrays of 2"):
        found.batch(2)


def test_only_different_rewards_are_informative():
    assert rollouts((0.1, 0.1 + 1e-9, 0.5, 0.4)).informative.tolist() == [False, True]


def test_parts_are_taken_and_joined_again():
    whole = rollouts((0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    parts = [whole.take([0]), whole.take([1, 2])]
    assert parts[1].positions == (8, 9) and parts[1].texts == whole.texts[2:]
    joined = Rollouts.join(parts, pad_id=0)
    assert joined.seconds == {"decode": 3.0} and joined.counts == {"decode_steps": 6}
    for name in ("tokens", "lengths", "logprobs"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert joined.rewards == whole.rewards and joined.positions == whole.positions


def test_parts_of_different_width_are_padded():
    short, long = rollouts(longest=2, seed=1), rollouts(longest=4)
    joined = Rollouts.join([short, long], pad_id=77)
    assert joined.tokens.shape == (8, 4) and (joined.tokens[:4, 2:] == 77).all()
    assert (joined.logprobs[:4, 2:] == 0).all()
    np.testing.assert_array_equal(joined.tokens[4:], long.tokens)
