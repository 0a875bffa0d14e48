"""Cross-entropy over supervised positions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm4d_jax.parallel.logits import over_positions, pick


class TokenLoss(NamedTuple):
    """Sums over the supervised positions; divide by `weight` for means.

    Attributes:
      loss: f32[] weighted sum of the negative log-likelihoods (nats).
      weight: f32[] sum of the weights.
      correct: f32[] weighted count of positions of which no logit is larger than the target's.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


def token_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    mesh: Mesh | None = None,
) -> TokenLoss:
    """Softmax cross-entropy of `hidden @ head` in float32.

    Args:
      hidden: [B, M, H] final hidden states that predict the targets, in the activation dtype.
      head: [H, V] output projection.
      targets: i32[B, M] token ids.
      weights: f32[B, M], 0 for padding.
      chunk, mesh: see `logits.over_positions`.
    """

    def scores(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        picked = pick(logits, targets)
        correct = picked >= jax.lax.stop_gradient(logits).max(-1)
        return jax.nn.logsumexp(logits, axis=-1) - picked, correct.astype(jnp.float32)

    loss, correct = over_positions(scores, hidden, head, (targets,), chunk=chunk, mesh=mesh)
    return TokenLoss(jnp.sum(weights * loss), jnp.sum(weights), jnp.sum(weights * correct))
