"""The chunked cross-entropy against a full softmax in numpy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm4d_jax.sft.step import token_cross_entropy

B, M, H, V = 3, 13, 6, 29


def make_inputs():
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(B, M, H)).astype(np.float32)
    head = (3 * rng.normal(size=(H, V))).astype(np.float32)
    targets = rng.integers(0, V, (B, M)).astype(np.int32)
    weights = rng.uniform(0, 2, (B, M)).astype(np.float32)
    weights[:, [4, 9]] = 0
    return hidden, head, targets, weights


def reference(hidden, head, targets, weights):
    """Value and gradients by the textbook formulas, float64."""
    shape = hidden.shape
    hidden, targets, weights = hidden.reshape(-1, H), targets.reshape(-1), weights.reshape(-1)
    hidden, head, weights = (x.astype(np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -(weights * np.log(probs[rows, targets])).sum()
    delta = probs.copy()
    delta[rows, targets] -= 1
    delta *= weights[:, None]
    correct = (weights * (logits.argmax(-1) == targets)).sum()
    return loss, weights.sum(), correct, (delta @ head.T).reshape(shape), hidden.T @ delta


@pytest.mark.parametrize("chunk", [1, 12, 39, 1000])
def test_value_and_gradient(chunk):
    hidden, head, targets, weights = make_inputs()
    loss, weight, correct, d_hidden, d_head = reference(hidden, head, targets, weights)

    def total(hidden, head):
        out = token_cross_entropy(hidden, head, targets, weights, chunk)
        return out.loss, out

    (value, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(value, loss, rtol=2e-6)
    np.testing.assert_allclose(out.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(out.correct, correct, rtol=1e-6)
    np.testing.assert_allclose(grads[0], d_hidden, atol=2e-5)
    np.testing.assert_allclose(grads[1], d_head, atol=2e-5)


def test_padding_positions_do_not_count():
    hidden, head, targets, weights = make_inputs()
    short = token_cross_entropy(hidden, head, targets, weights, 4)
    padded = token_cross_entropy(
        jnp.pad(hidden, ((0, 0), (0, 8), (0, 0)), constant_values=7.0),
        head,
        jnp.pad(targets, ((0, 0), (0, 8))),
        jnp.pad(weights, ((0, 0), (0, 8))),
        4,
    )
    for a, b in zip(short, padded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_no_array_of_all_logits_exists():
    """The compiled gradient's scratch memory stays far below one [M, V] float32 array."""
    m, v = 4096, 8192
    shapes = (
        jax.ShapeDtypeStruct((4, m // 4, 16), jnp.float32),
        jax.ShapeDtypeStruct((16, v), jnp.float32),
        jax.ShapeDtypeStruct((4, m // 4), jnp.int32),
        jax.ShapeDtypeStruct((4, m // 4), jnp.float32),
    )

    def loss(hidden, head, targets, weights):
        return token_cross_entropy(hidden, head, targets, weights, 128).loss

    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < m * v * 4 / 4


def test_logits_of_bfloat16_inputs_are_float32():
    """Sums of bf16-rounded logits would miss by far more than this."""
    hidden, head, targets, weights = make_inputs()
    hidden16, head16 = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    loss, *_ = reference(np.asarray(hidden16, np.float32), np.asarray(head16, np.float32), targets, weights)
    out = token_cross_entropy(hidden16, head16, targets, weights, 4)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5)


def test_ties_and_nothing_to_count():
    """A target that shares the largest logit is correct; without weights all sums are zero."""
    hidden, head = np.ones((1, 2, H), np.float32), np.zeros((H, V), np.float32)
    targets = np.array([[3, 5]], np.int32)
    out = token_cross_entropy(hidden, head, targets, np.array([[2, 1]], np.float32), 8)
    np.testing.assert_allclose(out, [3 * np.log(V), 3, 3], rtol=1e-6)
    assert [float(x) for x in token_cross_entropy(hidden, head, targets, np.zeros((1, 2), np.float32), 8)] == [0, 0, 0]
