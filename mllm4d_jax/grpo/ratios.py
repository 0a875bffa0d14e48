"""Importance ratios: of the trained policy to the one that sampled, and of the learner's numbers to the sampler's.

All log-probs are f32[B, T] in nats at the sampling temperature; where the mask is 0 they may be anything, NaN included.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mllm4d_jax.grpo.batch import Mean, RolloutBatch, masked_mean

LEVELS = ("token", "sequence", "sequence_token")

# exp(20) is 5e8: a ratio beyond it says only that the policies have nothing in common. Without the bound it becomes
# inf, and inf times an advantage of 0 is NaN. Beyond the bound the gradient is 0.
MAX_LOG_RATIO = 20.0


def log_ratio(logprobs: jax.Array, others: jax.Array, mask: jax.Array) -> jax.Array:
    """f32[B, T] log-probs minus others, within +-MAX_LOG_RATIO; 0 (and no gradient) where the mask is 0."""
    counts = mask > 0
    ours = jnp.where(counts, logprobs.astype(jnp.float32), 0.0)
    theirs = jnp.where(counts, others.astype(jnp.float32), 0.0)
    return jnp.clip(ours - theirs, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_ratio(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array, level: str) -> jax.Array:
    """r[b, t], the ratio that the surrogate clips.

    With q[b, t] = pi(y_t) / pi_old(y_t), |y| the counted tokens of completion b, and sg the stop-gradient:

    | level | r[b, t] | source |
    |---|---|---|
    | token | q[b, t] | GRPO, arXiv 2402.03300 |
    | sequence | s[b] = exp(1/|y| sum_t log q[b, t]) | GSPO, arXiv 2507.18071 |
    | sequence_token | sg(s[b]) pi(y_t) / sg(pi(y_t)) | GSPO-token, the same paper |

    The last two have equal values. Their gradients differ only with advantages that vary inside a completion: there
    GSPO-token gives every token the gradient of its own advantage.

    Returns:
      f32[B, T], positive and finite.

    Raises:
      ValueError: unknown level.
    """
    logs = log_ratio(logprobs, old_logprobs, mask)
    if level == "token":
        return jnp.exp(logs)
    if level not in LEVELS:
        raise ValueError(f"ratio level {level!r} is unknown (known: {', '.join(LEVELS)})")
    count = jnp.sum((mask > 0).astype(jnp.float32), axis=1, keepdims=True)
    sequence = jnp.exp(jnp.sum(logs, axis=1, keepdims=True) / jnp.maximum(count, 1.0))  # f32[B,1]
    if level == "sequence":
        return jnp.broadcast_to(sequence, mask.shape)
    own = log_ratio(logprobs, jax.lax.stop_gradient(logprobs), mask)  # 0, with the gradient of the token's log-prob
    return jax.lax.stop_gradient(sequence) * jnp.exp(own)


class Gap(NamedTuple):
    """How far the learner's log-probs of the sampled tokens are from the sampler's own.

    Attributes:
      mean_abs: mean over tokens of |learner - sampler| (nats).
      max_abs: f32[] the largest.
      kl: estimate of KL(sampler || learner) per token: mean of exp(d) - d - 1, d = learner - sampler.
    """

    mean_abs: Mean
    max_abs: jax.Array
    kl: Mean


def sampler_gap(learner: jax.Array, sampler: jax.Array, mask: jax.Array) -> Gap:
    """Compares f32[B, T] log-probs of the same tokens under what should be the same policy."""
    d = log_ratio(learner, sampler, mask)
    # expm1: at gaps of 1e-4 the result is 1e-8, all of which 'exp(d) - 1' would round away.
    return Gap(masked_mean(jnp.abs(d), mask), jnp.max(jnp.abs(d), initial=0.0), masked_mean(jnp.expm1(d) - d, mask))


def truncated_importance(learner: jax.Array, sampler: jax.Array, mask: jax.Array, cap: float) -> jax.Array:
    """w = min(pi_learner / pi_sampler, cap), constant for the gradient; 1 where the mask is 0.

    The truncation of IMPALA's V-trace (arXiv 1802.01561) applied to two implementations (or ages) of one policy.

    Returns:
      f32[B, T].
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio(learner, sampler, mask)), cap))


def correct_for_gap(
    batch: RolloutBatch, learner_logprobs: jax.Array, *, bound: float, cap: float
) -> tuple[RolloutBatch, Gap]:
    """Makes sampler log-probs that the learner does not share safe to train on.

    With a mean gap within `bound` the batch is used as it is. Beyond it the learner's log-probs become the old ones, so
    that clipping sees the update alone, and the policy term is weighted by `truncated_importance`.

    Args:
      batch: whole batch of the step, old log-probs from the sampler.
      learner_logprobs: f32[B, T] of the same tokens from the learner before its update.
      bound: nats per token; cap: greatest weight.

    Returns:
      (batch with old log-probs and importance set, the measured gap).
    """
    learner = jax.lax.stop_gradient(learner_logprobs.astype(jnp.float32))
    gap = sampler_gap(learner, batch.old_logprobs, batch.mask)
    beyond = gap.mean_abs.value > bound
    weights = truncated_importance(learner, batch.old_logprobs, batch.mask, cap)
    corrected = batch._replace(
        old_logprobs=jnp.where(beyond, learner, batch.old_logprobs),
        importance=jnp.where(beyond, weights, jnp.ones_like(weights)),
    )
    return corrected, gap
