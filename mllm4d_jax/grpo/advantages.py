"""From the rewards of a group of completions to their advantages."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mllm4d_jax.grpo.batch import Mean

SCALES = ("group", "batch", "none")

# A group whose rewards differ by no more than this is dead. Equal rewards leave a rounding residue of about 1e-8 around
# their mean, and divided by a standard deviation of the same size it would become an advantage of order 1.
DEAD_SPREAD = 1e-6


class GroupStatistics(NamedTuple):
    """Of each row's own group.

    Attributes:
      centered: f32[B] reward minus the mean of the group, 0 for filling rows.
      std: f32[B].
      dead: bool[B], max - min <= DEAD_SPREAD; true for filling rows.
      first: bool[B], true for one row of every group: summing over it counts groups.
    """

    centered: jax.Array
    std: jax.Array
    dead: jax.Array
    first: jax.Array


def group_statistics(rewards: jax.Array, groups: jax.Array, ddof: int) -> GroupStatistics:
    """Statistics of every group, at every row of it.

    Args:
      rewards: f32[B].
      groups: i32[B]; rows with a negative id belong to no group.
      ddof: the variance is divided by (group size - ddof), by at least 1.
    """
    rewards = rewards.astype(jnp.float32)
    # Comparing all pairs needs no order, no group size and no bound on the ids; B is at most a few thousand.
    same = (groups[:, None] == groups[None, :]) & (groups >= 0)[:, None]  # bool[B,B]
    size = jnp.sum(same, axis=1).astype(jnp.float32)
    low = jnp.min(jnp.where(same, rewards[None, :], jnp.inf), axis=1)
    high = jnp.max(jnp.where(same, rewards[None, :], -jnp.inf), axis=1)
    # Relative to the group's lowest, or close rewards would lose their differences to the rounding of their mean.
    above = jnp.where(same, rewards[None, :] - low[:, None], 0.0)  # f32[B,B]
    mean = jnp.sum(above, axis=1) / jnp.maximum(size, 1.0)
    squares = jnp.where(same, (above - mean[:, None]) ** 2, 0.0)
    std = jnp.sqrt(jnp.sum(squares, axis=1) / jnp.maximum(size - ddof, 1.0))
    centered = jnp.where(groups >= 0, (rewards - low) - mean, 0.0)
    index = jnp.arange(groups.shape[0])
    earlier = jnp.any(same & (index[None, :] < index[:, None]), axis=1)
    return GroupStatistics(centered, std, ~(high - low > DEAD_SPREAD), (groups >= 0) & ~earlier)


def group_advantages(
    rewards: jax.Array, groups: jax.Array, *, scale: str, ddof: int = 1, eps: float = 1e-4
) -> tuple[jax.Array, Mean]:
    """A = (r - mean of the group) / s, and 0 in dead groups.

    | scale | s | source |
    |---|---|---|
    | group | std of the group + eps | GRPO, arXiv 2402.03300 |
    | batch | std of all rewards of the batch + eps | arXiv 2508.08221 |
    | none | 1 | Dr. GRPO, arXiv 2503.20783 |

    The GRPO paper does not say which standard deviation. TRL and ms-swift (the trainer of the MLLM-4D release) call
    torch.std, which is the unbiased one (ddof 1), and add 1e-4.

    Args:
      rewards: f32[B]; groups: i32[B], negative for filling rows.
      scale: one of SCALES.
      ddof: 1 for the unbiased variance, 0 for the population's.
      eps: added to the standard deviation.

    Returns:
      (f32[B] advantages, share of dead groups among the groups).

    Raises:
      ValueError: unknown scale.
    """
    rewards = rewards.astype(jnp.float32)
    stats = group_statistics(rewards, groups, ddof)
    if scale == "group":
        divisor = stats.std + eps
    elif scale == "batch":
        everything = jnp.where(groups >= 0, 0, -1)
        divisor = group_statistics(rewards, everything, ddof).std + eps
    elif scale == "none":
        divisor = 1.0
    else:
        raise ValueError(f"advantage scale {scale!r} is unknown (known: {', '.join(SCALES)})")
    advantages = jnp.where(stats.dead, 0.0, stats.centered / divisor)
    first = stats.first.astype(jnp.float32)
    return advantages, Mean(jnp.sum(first * stats.dead), jnp.sum(first))


def informative(rewards: jax.Array, groups: jax.Array) -> jax.Array:
    """bool[B], true for completions of groups whose rewards are not all equal: what dynamic sampling keeps.

    DAPO, arXiv 2503.14476: a prompt that is always or never solved teaches nothing, another is sampled in its place.

    Args:
      rewards: f32[B] as scored (a penalty on length would make every group look informative); groups: i32[B].
    """
    return ~group_statistics(rewards, groups, 0).dead


def soft_overlong(lengths: jax.Array, max_length: int, cache: int, penalty: float = 1.0) -> jax.Array:
    """What a long completion loses: 0 up to max_length - cache tokens, then linearly down to -penalty at max_length.

    DAPO, arXiv 2503.14476, with L_max = max_length and L_cache = cache: the step from a finished to a cut-off
    completion becomes a slope. Add it to the rewards.

    Args:
      lengths: [B] tokens of each completion.
      max_length: the length cap; cache: tokens before it over which the penalty grows, 1..max_length.
      penalty: the greatest loss.

    Returns:
      f32[B] in [-penalty, 0].

    Raises:
      ValueError: cache outside 1..max_length.
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"an overlong cache of {cache} tokens does not fit a cap of {max_length}")
    over = (lengths.astype(jnp.float32) - (max_length - cache)) / cache
    return -penalty * jnp.clip(over, 0.0, 1.0)
