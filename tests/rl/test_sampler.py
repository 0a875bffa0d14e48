"""Generation: greedy equals teacher forcing, sampling follows the softmax, rows do not depend on each other."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm4d_jax.eval.reference import build_case, read_arrays
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.rl.sampler import SamplingOptions, draw, generate, row_lengths

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@functools.lru_cache
def model():
    return load_model(GOLDEN / "qwen3_vl", dtype=jnp.float32, attention="xla")


@functools.lru_cache
def case(name="batch"):
    return build_case(name, read_arrays(GOLDEN / "qwen3_vl" / f"{name}.npz"), model().config, "release")


def run(inputs, **options):
    keep = {k: options.pop(k) for k in ("max_new_tokens", "seed", "chunk", "keep_logits") if k in options}
    with jax.default_matmul_precision("highest"):
        return generate(model(), inputs, **{"max_new_tokens": 12, **keep}, options=SamplingOptions(**options))


def test_greedy_equals_the_recording_for_any_chunk():
    recorded = case().arrays["gen_ids"]
    for chunk in (1, 5, 16):
        np.testing.assert_array_equal(run(case().inputs, chunk=chunk).tokens, recorded)


def test_right_padding_gives_the_same_tokens():
    right = case("batch_right").inputs
    assert not np.array_equal(right.segment_ids, case().inputs.segment_ids)
    np.testing.assert_array_equal(run(right).tokens, case().arrays["gen_ids"])


def test_logprobs_are_those_of_a_full_pass():
    case_, result = case("text"), run(case("text").inputs, temperature=0.7, seed=3)
    prompt = case_.inputs
    n = prompt.tokens.shape[1]
    following = np.broadcast_to(n + np.arange(12), (3, 1, 12))
    full = prompt._replace(
        tokens=np.concatenate([prompt.tokens, result.tokens], 1),
        positions=np.concatenate([prompt.positions, following], 2).astype(np.int32),
        segment_ids=np.ones((1, n + 12), np.int32),
        vision_index=np.full((1, n + 12), -1, np.int32),
    )
    with jax.default_matmul_precision("highest"):
        logits = model().logits(model()(jax.tree.map(jnp.asarray, full)))[0, n - 1 : n + 11] / 0.7
    expected = jax.nn.log_softmax(logits)[jnp.arange(12), result.tokens[0]]
    np.testing.assert_allclose(result.logprobs[0], expected, atol=1e-4)


def test_a_row_alone_gives_what_it_gives_in_a_batch():
    inputs = case().inputs
    both = run(inputs, temperature=1.0, seed=5)
    twice = run(inputs, temperature=1.0, seed=5)
    np.testing.assert_array_equal(both.tokens, twice.tokens)
    assert not np.array_equal(both.tokens, run(inputs, temperature=1.0, seed=6).tokens)
    first = inputs._replace(
        tokens=inputs.tokens[:1],
        positions=inputs.positions[:, :1],
        segment_ids=inputs.segment_ids[:1],
        vision_index=inputs.vision_index[:1],
    )
    np.testing.assert_array_equal(run(first, temperature=1.0, seed=5).tokens[0], both.tokens[0])


def test_end_tokens_stop_a_row_and_leave_zeros():
    greedy = case().arrays["gen_ids"]
    stop = int(greedy[0, 3])
    result = run(case().inputs, eos_ids=(stop,))
    first = int(np.flatnonzero(greedy[0] == stop)[0])
    assert result.lengths[0] == first + 1 <= 4
    np.testing.assert_array_equal(result.tokens[0, : first + 1], greedy[0, : first + 1])
    assert (result.tokens[0, first + 1 :] == 0).all() and (result.logprobs[0, first + 1 :] == 0).all()
    other = np.flatnonzero(greedy[1] == stop)
    kept = int(other[0]) + 1 if len(other) else 12
    np.testing.assert_array_equal(result.tokens[1, :kept], greedy[1, :kept])


def test_generation_ends_early_when_all_rows_have():
    greedy = case("text").arrays["gen_ids"]
    result = run(case("text").inputs, eos_ids=(int(greedy[0, 0]),), max_new_tokens=500)
    assert result.lengths.tolist() == [1] and result.positions.shape[1] == 1


def test_forbidden_tokens_are_never_drawn():
    greedy = case().arrays["gen_ids"]
    forbidden = tuple(int(t) for t in np.unique(greedy[:, 0]))
    result = run(case().inputs, forbidden_ids=forbidden)
    assert not np.isin(result.tokens, forbidden).any()


LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03]))


def frequencies(n=20000, **options):
    keys = jax.random.split(jax.random.key(0), n)
    tokens, _ = draw(jnp.broadcast_to(LOGITS, (n, 5)), keys, SamplingOptions(**options))
    return np.bincount(tokens, minlength=5) / n


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(temperature=1.0), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (dict(temperature=0.5), np.array([0.25, 0.0625, 0.0225, 0.0049, 0.0009]) / 0.3408),
        (dict(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (dict(temperature=1.0, top_p=0.8), np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9),
        (dict(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0]),
    ],
)
def test_frequencies_follow_the_distribution(options, expected):
    expected = np.asarray(expected)
    found = frequencies(**options)
    assert (found[expected == 0] == 0).all()
    used = expected > 0
    chi2 = 20000 * np.sum((found[used] - expected[used]) ** 2 / expected[used])
    assert chi2 < 20  # 99.9 % quantile of 4 degrees of freedom is 18.5; the draw is deterministic


def test_lengths_count_the_end_token():
    tokens = np.array([[5, 9, 1], [1, 2, 3], [9, 9, 9]])
    assert row_lengths(tokens, (9,)).tolist() == [2, 3, 1]
    assert row_lengths(tokens, ()).tolist() == [3, 3, 3]


@pytest.mark.parametrize("bad", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)])
def test_options_are_checked(bad):
    with pytest.raises(ValueError, match="are required"):
        SamplingOptions(**bad)
