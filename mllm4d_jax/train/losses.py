"""Cross-entropy over supervised positions, without ever holding all their logits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLoss(NamedTuple):
    """Sums over the supervised positions; divide by `weight` for means.

    Attributes:
      loss: f32[] weighted sum of the negative log-likelihoods (nats).
      weight: f32[] sum of the weights.
      correct: f32[] weighted count of positions whose target has the largest logit.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


def token_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> TokenLoss:
    """Softmax cross-entropy of `hidden @ head` in float32, `chunk` positions at a time.

    A chunk's logits are computed again in the backward pass, so that at most one `[chunk, V]` array exists in either
    direction.

    Args:
      hidden: [M, H] final hidden states that predict the targets, in the activation dtype.
      head: [H, V] output projection, same dtype.
      targets: i32[M] token ids.
      weights: f32[M], 0 for padding.
      chunk: positions per chunk; M is padded up to a multiple.
    """
    m = hidden.shape[0]
    chunk = min(chunk, m)
    padding = -m % chunk

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    @jax.checkpoint
    def body(total: TokenLoss, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[TokenLoss, None]:
        sums = _chunk_sums(head, *piece)
        return TokenLoss(*(a + b for a, b in zip(total, sums, strict=True))), None

    zero = TokenLoss(*(jnp.zeros((), jnp.float32) for _ in TokenLoss._fields))
    total, _ = jax.lax.scan(body, zero, (chunks(hidden), chunks(targets), chunks(weights)))
    return total


def _chunk_sums(head: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenLoss:
    logits = jnp.einsum("mh,hv->mv", hidden, head, preferred_element_type=jnp.float32)
    # A masked sum instead of a gather: it stays local when the vocabulary is sharded.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    picked = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    correct = jnp.argmax(logits, axis=-1) == targets
    return TokenLoss(jnp.sum(weights * loss), jnp.sum(weights), jnp.sum(weights * correct))
