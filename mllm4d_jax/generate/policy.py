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
from jax.sharding import Mesh

from mllm4d_jax.parallel.logits import over_positions, pick
from mllm4d_jax.parallel.products import einsum_f32

# Finite, so that a banned token adds exactly 0 to the entropy instead of 0 times infinity.
_BANNED = -1e30


class TokenScores(NamedTuple):
    """Per position.

    Attributes:
      logprobs: f32[B, M] of the targets; about -1e30 for a banned target.
      entropy: f32[B, M] of the distribution, nats.
    """

    logprobs: jax.Array
    entropy: jax.Array


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[..., H] and [H, V] -> f32[..., V], summed in fp32 and not rounded to the activation dtype."""
    return einsum_f32("...h,hv->...v", hidden, head.astype(hidden.dtype))


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


def target_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-softmax at the targets: f32[..., V] and i32[...] -> f32[...]."""
    return pick(logits, targets) - jax.nn.logsumexp(logits, -1)


def token_scores(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float,
    banned_ids: Sequence[int],
    *,
    chunk: int = 1024,
    mesh: Mesh | None = None,
) -> TokenScores:
    """Log-probs of the targets and entropies; differentiable.

    Args:
      hidden: [B, M, H] final hidden states that predict the targets.
      head: [H, V] output projection.
      targets: i32[B, M].
      temperature, banned_ids: those of the sampler (`SamplingOptions`).
      chunk, mesh: see `parallel.logits.over_positions`.
    """

    def scores(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        policy = policy_logits(logits, temperature, banned_ids)
        whole = jax.nn.logsumexp(policy, -1, keepdims=True)
        share = jnp.exp(policy - whole)
        # Finite banned logits: 0 times -1e30 is 0.
        return pick(policy, targets) - whole[..., 0], whole[..., 0] - jnp.sum(share * policy, -1)

    return TokenScores(*over_positions(scores, hidden, head, (targets,), chunk=chunk, mesh=mesh))
