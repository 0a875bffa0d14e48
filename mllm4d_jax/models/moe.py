"""Sparse feed-forward layer of Qwen3-VL-MoE: softmax router, top-k experts, no capacity and no dropped token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mllm4d_jax.models.config import MoEConfig
from mllm4d_jax.models.layers import parameter


class RouterStats(NamedTuple):
    """What the load-balancing loss needs, summed over the real tokens of one layer.

    Attributes:
      assignments: f32[E] number of tokens routed to each expert.
      probabilities: f32[E] sum of the router probabilities.
      tokens: f32[] number of real tokens.
    """

    assignments: jax.Array
    probabilities: jax.Array
    tokens: jax.Array


class SparseMLP(nnx.Module):
    """Weighted sum of the top-k experts' gated MLPs.

    Expert weights keep the published layout: gate_up [E, H, 2I] with the gate columns first, down [E, I, H]. Tokens are
    sorted by expert and multiplied by `jax.lax.ragged_dot`, so that cost follows top-k, not the number of experts.
    """

    def __init__(self, width: int, config: MoEConfig, *, dtype, rngs: nnx.Rngs):
        e, i = config.num_experts, config.intermediate_size
        self.router = parameter(rngs, (width, e), dtype, ("embed", None))
        self.gate_up = parameter(rngs, (e, width, 2 * i), dtype, ("experts", "embed", "mlp"))
        self.down = parameter(rngs, (e, i, width), dtype, ("experts", "mlp", "embed"))
        self.top_k = config.top_k

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, RouterStats, tuple]:
        """Applies the layer.

        Args:
          x: [B, S, H].
          real: bool[B, S], False for padding (only the statistics look at it).

        Returns:
          (y [B, S, H], statistics, (router logits, weights, indices) of the B*S tokens).
        """
        shape, experts = x.shape, self.gate_up.shape[0]
        x = x.reshape(-1, shape[-1])
        logits = x @ self.router[...].astype(x.dtype)
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probs, self.top_k)
        weights = (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)

        flat = chosen.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
        rows = x[order // self.top_k]
        gate, up = jnp.split(jax.lax.ragged_dot(rows, self.gate_up[...].astype(x.dtype), sizes), 2, axis=-1)
        out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, self.down[...].astype(x.dtype), sizes)
        out = out * weights.reshape(-1)[order][:, None]
        y = jnp.zeros_like(x).at[order // self.top_k].add(out)

        mask = real.reshape(-1, 1).astype(jnp.float32)
        hits = jax.nn.one_hot(chosen, experts, dtype=jnp.float32).sum(1)
        stats = RouterStats((hits * mask).sum(0), (probs * mask).sum(0), mask.sum())
        return y.reshape(shape), stats, (logits, weights, chosen)


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """Switch-style auxiliary loss over all sparse layers pooled: E * sum_e f_e P_e (f sums to top-k).

    Args:
      stats: RouterStats with a leading layer dimension.
    """
    total = stats.tokens.sum()
    fraction = stats.assignments.sum(0) / total
    probability = stats.probabilities.sum(0) / total
    return stats.assignments.shape[-1] * jnp.sum(fraction * probability)
