"""Sparse layer against a loop over tokens in float64, and the balancing loss by its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.models.config import MoEConfig
from mllm4d_jax.models.layers import RouterStats, SparseMLP, load_balancing_loss


def layer(experts=5, top_k=2, width=8, hidden=6):
    config = MoEConfig(experts, top_k, hidden, (True,))
    module = SparseMLP(width, config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for p in (module.router, module.gate_up, module.down):
        p[...] = jnp.asarray(rng.normal(size=p.shape), jnp.float32)
    return module


def reference(module, x):
    router, gate_up, down = (np.asarray(p[...], np.float64) for p in (module.router, module.gate_up, module.down))
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = token @ router
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        chosen = np.argsort(-probs)[: module.top_k]
        for e in chosen:
            gate, up = np.split(token @ gate_up[e], 2)
            out[t] += probs[e] / probs[chosen].sum() * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    return out


def test_equals_token_loop():
    module = layer()
    x = np.random.default_rng(1).normal(size=(2, 7, 8))
    with jax.default_matmul_precision("highest"):
        y, _, _ = jax.jit(lambda x: module(x, jnp.ones((2, 7), bool)))(x.astype(np.float32))
    np.testing.assert_allclose(np.asarray(y).reshape(14, 8), reference(module, x.reshape(14, 8)), atol=2e-5)


def test_all_tokens_on_one_expert_are_all_served():
    module = layer(top_k=1)
    module.router[...] = jnp.zeros((8, 5)).at[:, 3].set(1.0)
    x = np.abs(np.random.default_rng(2).normal(size=(1, 9, 8)))
    with jax.default_matmul_precision("highest"):
        y, stats, (_, _, chosen) = module(x.astype(np.float32), jnp.ones((1, 9), bool))
    assert (np.asarray(chosen) == 3).all() and stats.assignments[3] == 9
    np.testing.assert_allclose(y[0], reference(module, x[0]), atol=2e-5)


def test_balancing_loss_ignores_padding_and_is_top_k_when_balanced():
    module = layer()
    x = np.random.default_rng(3).normal(size=(1, 6, 8)).astype(np.float32)
    real = jnp.array([[1, 1, 1, 1, 0, 0]], bool)
    _, stats, _ = module(x, real)
    _, alone, _ = module(x[:, :4], real[:, :4])
    for a, b in zip(stats, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert stats.assignments.sum() == 2 * 4
    even = RouterStats(jnp.full((3, 4), 2.0), jnp.full((3, 4), 1.0), jnp.full(3, 4.0))  # 3 layers, 4 experts, top-2
    np.testing.assert_allclose(load_balancing_loss(even), 2.0, rtol=1e-6)
