"""The loss of one batch of completions: surrogate and KL term per token, weighted into one sum.

    loss = sum over b, t of w[b, t] (importance[b, t] surrogate(r[b, t], A[b, t]) + beta KL[b, t])

`w` divides by counts over the whole step, so that the losses and gradients of micro-batches and devices simply add up.
In a step (`learner`): `prepare`, `ratios.correct_for_gap` and `batch.denominators` for the whole batch, then
`objective` for each of its parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mllm4d_jax.grpo.advantages import group_advantages, informative, soft_overlong
from mllm4d_jax.grpo.batch import Denominators, Mean, RolloutBatch, masked_mean
from mllm4d_jax.grpo.presets import KL_ESTIMATORS, REDUCTIONS, ObjectiveConfig
from mllm4d_jax.grpo.ratios import log_ratio, policy_ratio


def prepare(batch: RolloutBatch, config: ObjectiveConfig) -> tuple[RolloutBatch, dict[str, Mean]]:
    """Sets the advantages, and takes completions that must not count out of the mask.

    - overlong "soft": the punishment is added to the rewards before the advantages (`batch.rewards` stay as scored).
    - overlong "mask": truncated completions count in their group's statistics but not in the loss (overlong filtering
      of DAPO, arXiv 2503.14476).
    - dynamic sampling: so do groups whose scored rewards are all equal.

    Args:
      batch: whole batch of the step; groups must be complete.

    Returns:
      (new batch, metrics: reward, dead_groups (share of groups), truncated and dropped (shares of completions)).
    """
    real = (batch.groups >= 0).astype(jnp.float32)
    rewards = batch.rewards.astype(jnp.float32)
    if config.overlong == "soft":
        lengths = jnp.sum(batch.mask, axis=1)
        rewards += soft_overlong(lengths, config.max_completion, config.overlong_cache, config.overlong_penalty)
    how = dict(scale=config.scale, ddof=config.ddof, eps=config.std_eps)
    advantages, dead = group_advantages(rewards, batch.groups, **how)
    kept = jnp.ones_like(real)
    if config.overlong == "mask":
        kept *= ~batch.truncated
    if config.dynamic_sampling:
        kept *= informative(batch.rewards, batch.groups)
    metrics = {
        "reward": masked_mean(batch.rewards, real),
        "dead_groups": dead,
        "truncated": masked_mean(batch.truncated.astype(jnp.float32), real),
        "dropped": masked_mean(1.0 - kept, real),
    }
    return batch._replace(advantages=advantages, mask=batch.mask * kept[:, None]), metrics


def objective(
    logprobs: jax.Array,
    batch: RolloutBatch,
    totals: Denominators,
    config: ObjectiveConfig,
    entropy: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Mean]]:
    """Loss to minimise and what to log; differentiable in `logprobs` alone.

    Args:
      logprobs: f32[B, T] of the sampled tokens under the policy being trained (nats, sampling temperature).
      batch: a prepared batch or a micro-batch of it.
      totals: `denominators` of the mask of the whole prepared batch.
      config: the objective.
      entropy: f32[B, T] of the policy's distribution at each token, if it should be logged.

    Returns:
      (f32[] loss of these rows, metrics over their tokens: ratio, clipped_low and clipped_high (shares of the tokens
      whose gradient or weight the bound cuts), kl if there are reference log-probs, importance if there are weights,
      entropy if given).

    Raises:
      ValueError: no advantages, or beta > 0 without reference log-probs.
    """
    if batch.advantages is None:
        raise ValueError("the batch has no advantages: pass the whole batch through `prepare` first")
    if config.beta > 0 and batch.reference_logprobs is None:
        raise ValueError(f"beta = {config.beta:g} needs the log-probs of the reference policy")
    mask = batch.mask.astype(jnp.float32)
    ratio = policy_ratio(logprobs, batch.old_logprobs, mask, config.ratio)
    advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
    advantages = jnp.where(mask > 0, advantages.astype(jnp.float32), 0.0)
    # Every log-prob that is used has passed the mask: anything may stand where it is 0.
    own = jnp.where(mask > 0, logprobs, 0.0)
    loss, low, high = surrogate(ratio, own, advantages, config)
    metrics = {
        "ratio": masked_mean(ratio, mask),
        "clipped_low": masked_mean(low, mask),
        "clipped_high": masked_mean(high, mask),
    }
    if batch.importance is not None:
        weights = jax.lax.stop_gradient(jnp.where(mask > 0, batch.importance, 0.0))
        loss = weights * loss
        metrics["importance"] = masked_mean(weights, mask)
    if batch.reference_logprobs is not None:
        divergence = kl(logprobs, batch.reference_logprobs, mask, config.kl)
        metrics["kl"] = masked_mean(divergence, mask)
        if config.beta > 0:
            loss = loss + config.beta * divergence
    if entropy is not None:
        metrics["entropy"] = masked_mean(entropy, mask)
    weights = token_weights(mask, totals, config.reduction, config.max_completion)
    return jnp.sum(weights * loss), jax.lax.stop_gradient(metrics)


def surrogate(
    ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array, config: ObjectiveConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Policy term of every token, to be minimised.

    | surrogate | term | source |
    |---|---|---|
    | clip | -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) | GRPO 2402.03300; eps_high > eps_low: DAPO 2503.14476 |
    | clip, dual_clip = c | the same for A >= 0, -max(min(...), c A) for A < 0 | arXiv 1912.09729 |
    | cispo | -sg(clip(r, 1 - eps_low, 1 + eps_high)) A log pi | CISPO, arXiv 2506.13585 |

    CISPO never drops a token: the bound limits its weight. Its authors set no lower bound (eps_low = 1).

    Args:
      ratio, logprobs, advantages: f32[B, T], finite.

    Returns:
      (term f32[B, T], 1 where the lower bound cuts, 1 where an upper bound (dual_clip's too) cuts).
    """
    floor, ceiling = 1.0 - config.eps_low, 1.0 + config.eps_high
    if config.surrogate == "cispo":
        weight = jax.lax.stop_gradient(jnp.clip(ratio, floor, ceiling))
        moves = advantages != 0
        low, high = moves & (ratio < floor), moves & (ratio > ceiling)
        return -weight * advantages * logprobs, low.astype(jnp.float32), high.astype(jnp.float32)
    # The minimum, written as the cases in which a bound wins: their shares are metrics, and no tie splits a gradient.
    low = (advantages < 0) & (ratio < floor)
    high = (advantages > 0) & (ratio > ceiling)
    bounded = jnp.where(low, floor, jnp.where(high, ceiling, ratio))
    if config.dual_clip is not None:
        worst = (advantages < 0) & (ratio > config.dual_clip)
        bounded, high = jnp.where(worst, config.dual_clip, bounded), high | worst
    return -bounded * advantages, low.astype(jnp.float32), high.astype(jnp.float32)


def kl(logprobs: jax.Array, reference: jax.Array, mask: jax.Array, estimator: str) -> jax.Array:
    """Estimate of KL(policy || reference) at each sampled token, 0 where the mask is 0.

    With d = log pi_ref - log pi. It stands in the loss, not in the reward, and its gradient is the plain derivative of
    the estimate; tokens are taken as sampled from the policy (no importance ratio).

    | estimator | value | derivative in log pi | |
    |---|---|---|---|
    | k1 | -d | 1 | unbiased value; its expected gradient is 0, so that it restrains nothing: for logging |
    | k2 | d^2 / 2 | -d | biased value; on policy its expected gradient is that of the KL |
    | k3 | exp(d) - d - 1 | 1 - exp(d) | unbiased, never negative; the one in GRPO, arXiv 2402.03300, equation 4 |

    Args:
      logprobs, reference: f32[B, T]; mask: f32[B, T].
      estimator: one of presets.KL_ESTIMATORS.

    Returns:
      f32[B, T].

    Raises:
      ValueError: unknown estimator.
    """
    d = -log_ratio(logprobs, jax.lax.stop_gradient(reference), mask)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d * d
    if estimator == "k3":
        return jnp.expm1(d) - d
    raise ValueError(f"KL estimator {estimator!r} is unknown (known: {', '.join(KL_ESTIMATORS)})")


def token_weights(mask: jax.Array, totals: Denominators, reduction: str, max_completion: int) -> jax.Array:
    """w[b, t], 0 where the mask is 0, for N counted completions of |y| counted tokens in the whole step.

    | reduction | w | source |
    |---|---|---|
    | sequence_mean | 1 / (N abs(y[b])) | GRPO, arXiv 2402.03300 |
    | token_mean | 1 / sum over b of abs(y[b]) | DAPO, arXiv 2503.14476 |
    | constant | 1 / (N max_completion) | Dr. GRPO, arXiv 2503.20783 |

    N leaves out completions without counted tokens; TRL and ms-swift divide by all.

    Args:
      mask: f32[B, T] of some of the completions; totals: of all.

    Returns:
      f32[B, T].

    Raises:
      ValueError: unknown reduction.
    """
    if reduction == "sequence_mean":
        length = jnp.sum(mask, axis=1, keepdims=True)
        return mask / (jnp.maximum(length, 1.0) * totals.rows)
    if reduction == "token_mean":
        return mask / totals.tokens
    if reduction == "constant":
        return mask / (max_completion * totals.rows)
    raise ValueError(f"reduction {reduction!r} is unknown (known: {', '.join(REDUCTIONS)})")
