"""The policy, the draw and its random keys, without a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mllm4d_jax.encode.tokenizer import Tokenizer, build_byte_level_tokenizer
from mllm4d_jax.generate.policy import (
    SamplingOptions,
    banned_token_ids,
    branch_keys,
    draw,
    policy_logits,
    prompt_id,
    token_scores,
)

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
N = 20000


def draws(**options):
    """N branches of one prompt."""
    keys = branch_keys(jnp.uint32(3), jnp.zeros((1, N), jnp.uint32), jnp.arange(N)[None])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (1, N, 5))
    tokens, logprobs = draw(logits, keys, 0, SamplingOptions(**options))
    return np.asarray(tokens[0]), np.asarray(logprobs[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(temperature=1.0), PROBABILITIES),
        (dict(temperature=0.5), PROBABILITIES**2),
        (dict(temperature=1.0, banned_ids=(0, 3)), PROBABILITIES * [0, 1, 1, 0, 1]),
        (dict(temperature=1.0, top_k=2), PROBABILITIES * [1, 1, 0, 0, 0]),
        (dict(temperature=1.0, top_p=0.8), PROBABILITIES * [1, 1, 1, 0, 0]),
        (dict(temperature=1.0, top_p=0.01), PROBABILITIES * [1, 0, 0, 0, 0]),
        (dict(temperature=1.0, top_p=0.5, banned_ids=(0,)), PROBABILITIES * [0, 1, 0, 0, 0]),
    ],
)
def test_frequencies_follow_the_distribution(options, expected):
    counts = np.bincount(draws(**options)[0], minlength=5)
    assert (counts[expected == 0] == 0).all()
    used = expected > 0
    if used.sum() > 1:
        assert stats.chisquare(counts[used], N * expected[used] / expected.sum()).pvalue > 1e-3


def test_logprobs_are_the_policys_whatever_restricts_the_draw():
    for restriction in ({}, dict(top_k=2), dict(top_p=0.8)):
        tokens, logprobs = draws(temperature=0.5, banned_ids=(1,), **restriction)
        policy = PROBABILITIES**2 * [1, 0, 1, 1, 1]
        np.testing.assert_allclose(logprobs, np.log((policy / policy.sum())[tokens]), atol=1e-5)
    tokens, logprobs = draws(banned_ids=(0,))  # greedy: at temperature 1
    assert (tokens == 1).all()
    np.testing.assert_allclose(logprobs, np.log(0.5), atol=1e-6)


def test_keys_depend_on_seed_prompt_branch_and_index_only():
    def first(seed, ids, branches, index=0):
        prompts = np.broadcast_to(np.array(ids, np.uint32)[:, None], np.shape(branches))
        keys = branch_keys(jnp.uint32(seed), jnp.asarray(prompts), jnp.array(branches))
        logits = jnp.zeros((*np.shape(branches), 10**5))
        return np.asarray(draw(logits, keys, index, SamplingOptions(temperature=1.0))[0])

    base = first(0, [5, 9], [[0, 1], [0, 1]])
    np.testing.assert_array_equal(first(0, [9], [[1]]), base[1:, 1:])
    np.testing.assert_array_equal(first(0, [9, 5], [[1, 0], [1, 0]]), base[::-1, ::-1])
    assert len(np.unique(base)) == 4
    assert not (first(1, [5, 9], [[0, 1], [0, 1]]) == base).any()
    assert not (first(0, [5, 9], [[0, 1], [0, 1]], 1) == base).any()


def test_token_scores_and_gradients_against_float64():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(12, 6)), rng.normal(size=(6, 9))
    targets, banned, temperature = rng.integers(2, 9, 12), (0, 1), 0.7
    logits = hidden @ head / temperature
    logits[:, banned] = -np.inf
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(logprobs)
    rows, weights = jnp.asarray(hidden, jnp.float32).reshape(2, 6, 6), jnp.asarray(head, jnp.float32)

    def scores(rows):
        return token_scores(rows, weights, jnp.asarray(targets).reshape(2, 6), temperature, banned, chunk=8)

    with jax.default_matmul_precision("highest"):
        out, grad = scores(rows), jax.grad(lambda h: scores(h).logprobs.sum())(rows)
        entropy_grad = jax.grad(lambda h: scores(h).entropy.sum())(rows)
    np.testing.assert_allclose(out.logprobs.ravel(), logprobs[np.arange(12), targets], atol=1e-5)
    finite = np.where(p > 0, logprobs, 0)
    entropy = -(p * finite).sum(-1)
    np.testing.assert_allclose(out.entropy.ravel(), entropy, atol=1e-5)
    np.testing.assert_allclose(grad.reshape(12, 6), (np.eye(9)[targets] - p) @ head.T / temperature, atol=1e-5)
    slope = -p * (finite + entropy[:, None]) @ head.T / temperature
    np.testing.assert_allclose(entropy_grad.reshape(12, 6), slope, atol=1e-5)


def test_policy_needs_a_temperature():
    with pytest.raises(ValueError, match="temperature above 0"):
        policy_logits(jnp.zeros(3), 0.0, ())


def test_banned_ids_of_a_tokenizer(tmp_path):
    build_byte_level_tokenizer(["a b"], 400).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    banned = banned_token_ids(tokenizer, tokenizer.vocab_size + 2)
    assert set(tokenizer.vision_ids) < set(banned) and not set(tokenizer.eos_ids) & set(banned)
    assert set(banned) - set(tokenizer.vision_ids) == {tokenizer.vocab_size, tokenizer.vocab_size + 1}


def test_prompt_ids_are_stable():
    assert prompt_id("clip/0") == int.from_bytes(bytes.fromhex("898c59f5"), "little")  # printf clip/0 | b2sum -l 32
    assert len({prompt_id(str(i)) for i in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(temperature=-1.0), "are required"),
        (dict(top_k=-1), "are required"),
        (dict(top_p=0.0), "are required"),
        (dict(top_p=1.5), "are required"),
        (dict(eos_ids=(3, 4), banned_ids=(4,)), r"tokens \[4\] are banned and end"),
        (dict(stop=("",)), "empty stop text"),
        (dict(require_exact=True), "drawn from the policy itself"),
        (dict(require_exact=True, temperature=1.0, top_k=5), "drawn from the policy itself"),
        (dict(require_exact=True, temperature=1.0, top_p=0.9), "drawn from the policy itself"),
    ],
)
def test_options_are_checked(bad, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**bad)
