"""Cross-entropy over supervised positions, without ever holding all their logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm4d_jax.parallel.rules import BATCH_AXES, batch_shards, constrain, constrain_rows

_VOCABULARY_AXES = ("tensor", "fsdp")  # mesh axes over which the head's vocabulary is split here


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
    """Softmax cross-entropy of `hidden @ head` in float32, about `chunk` positions at a time.

    A chunk's logits are computed again in the backward pass, so that at most one `[chunk, V]` array exists in either
    direction. On a mesh the head is split over its vocabulary by the axes tensor and fsdp, and each device computes
    its part of the logits for all rows of its group of devices; only sums over the vocabulary are exchanged. With rows
    and head split as they arrive, XLA would gather the whole head.

    Args:
      hidden: [B, M, H] final hidden states that predict the targets, in the activation dtype.
      head: [H, V] output projection, same dtype.
      targets: i32[B, M] token ids.
      weights: f32[B, M], 0 for padding.
      chunk: positions whose logits exist at a time in a group of devices that together hold the head; at least one of
        every row.
      mesh: devices over which rows and head are split; None for one.
    """
    rows, m = targets.shape
    groups = _groups(mesh, rows)
    together = rows // math.prod(mesh.shape[axis] for axis in groups) if mesh is not None else rows
    each = min(m, max(1, chunk // together))
    padding = -m % each
    head = constrain(head, mesh, None, _VOCABULARY_AXES)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return constrain_rows(x.reshape(rows, -1, each, *x.shape[2:]).swapaxes(0, 1), mesh, 1)

    @jax.checkpoint
    def body(total: TokenLoss, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[TokenLoss, None]:
        sums = _chunk_sums(head, *(constrain(x, mesh, groups or None) for x in piece), mesh, groups)
        return TokenLoss(*(a + b for a, b in zip(total, sums, strict=True))), None

    zero = TokenLoss(*(jnp.zeros((), jnp.float32) for _ in TokenLoss._fields))
    total, _ = jax.lax.scan(body, zero, (chunks(hidden), chunks(targets), chunks(weights)))
    return total


def _groups(mesh: Mesh | None, rows: int) -> tuple[str, ...]:
    """Mesh axes that split the rows and not the vocabulary."""
    if mesh is None or rows % batch_shards(mesh):
        return ()
    return tuple(axis for axis in BATCH_AXES if axis not in _VOCABULARY_AXES)


def _chunk_sums(
    head: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    mesh: Mesh | None,
    groups: tuple[str, ...],
) -> TokenLoss:
    logits = jnp.einsum("bmh,hv->bmv", hidden, head, preferred_element_type=jnp.float32)
    logits = constrain(logits, mesh, groups or None, None, _VOCABULARY_AXES)
    # Masked sums and maxima instead of a gather and an argmax: they stay local when the vocabulary is split.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    picked = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    correct = picked >= jax.lax.stop_gradient(logits).max(-1)
    return TokenLoss(jnp.sum(weights * loss), jnp.sum(weights), jnp.sum(weights * correct))
