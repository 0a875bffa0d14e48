"""The distribution that completions are drawn from, in one place for the sampler and the learner.

It is softmax(logits / temperature) over the tokens that are not banned. Banned tokens (visual placeholders, padding)
can never be drawn, so they have no share in the normalisation either: what the sampler records is the exact probability
of what it did, sampled frequencies follow it, and the learner, who calls the same functions, reproduces it. Nothing
else changes the distribution: top-k and top-p are a matter of drawing, refused where exact log-probs are required.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a banned token adds exactly 0 to the entropy instead of 0 times infinity.
_BANNED = -1e30


class TokenScores(NamedTuple):
    """Per position.

    Attributes:
      logprobs: f32[M] of the targets; about -1e30 for a banned target.
      entropy: f32[M] of the distribution, nats.
    """

    logprobs: jax.Array
    entropy: jax.Array


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[..., H] and [H, V] -> f32[..., V], summed in fp32 and not rounded to the activation dtype."""
    return jnp.einsum("...h,hv->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def policy_logits(logits: jax.Array, temperature: float, banned_ids: Sequence[int]) -> jax.Array:
    """Unnormalised log-probs of the policy.

    Args:
      logits: f32[..., V].
      temperature: above 0.
      banned_ids: token ids below V.
    """
    if temperature <= 0:
        raise ValueError(f"log-probs need a temperature above 0, got {temperature} (greedy decoding reports them at 1)")
    if len(banned_ids):
        banned = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(banned_ids)].set(True)
        logits = jnp.where(banned, _BANNED, logits)
    return logits / temperature


def pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-softmax at the targets: f32[..., V] and i32[...] -> f32[...].

    A masked sum instead of a gather: it stays local when the vocabulary is sharded.
    """
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), -1) - jax.nn.logsumexp(logits, -1)


def token_scores(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float,
    banned_ids: Sequence[int],
    *,
    chunk: int = 1024,
) -> TokenScores:
    """Log-probs of the targets and entropies, `chunk` positions at a time; differentiable.

    A chunk's logits are computed again in the backward pass, so that at most one `[chunk, V]` array exists.

    Args:
      hidden: [M, H] final hidden states that predict the targets.
      head: [H, V] output projection.
      targets: i32[M].
      temperature, banned_ids: those of the sampler (`SamplingOptions`).
      chunk: positions per chunk; M is padded up to a multiple.
    """
    m = hidden.shape[0]
    chunk = min(chunk, m)
    padding = -m % chunk

    @jax.checkpoint
    def scores(piece: tuple[jax.Array, jax.Array]) -> TokenScores:
        logits = policy_logits(head_logits(piece[0], head), temperature, banned_ids)
        logprobs = jax.nn.log_softmax(logits, -1)
        return TokenScores(pick(logits, piece[1]), -jnp.sum(jnp.exp(logprobs) * logprobs, -1))

    pieces = (jnp.pad(hidden, ((0, padding), (0, 0))), jnp.pad(targets, (0, padding)))
    out = jax.lax.map(scores, jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), pieces))
    return TokenScores(*(x.reshape(-1)[:m] for x in out))


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float, banned_ids: Sequence[int]
) -> jax.Array:
    """f32[M] log-probs of the targets, as `token_scores` returns them."""
    return token_scores(hidden, head, targets, temperature, banned_ids).logprobs
