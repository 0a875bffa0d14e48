"""The one batch type that every objective reads, and sums that can be added up over its parts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RolloutBatch(NamedTuple):
    """B sampled completions of at most T tokens; a pytree, never changed in place.

    What belongs to the host alone (record keys, texts, seeds) stays outside: it has no place in a compiled step. Rows
    that only fill a static shape have group -1 and an empty mask; they count nowhere.

    Attributes:
      tokens: i32[B, T] sampled token ids, anything where the mask is 0.
      mask: f32[B, T], 1 for tokens that count (the end token included), else 0.
      groups: i32[B], equal for completions of one prompt. Any ids >= 0, in any order.
      old_logprobs: f32[B, T] log-probs (nats, at the sampling temperature) of the policy that drew the tokens.
      rewards: f32[B] as scored.
      truncated: bool[B], the length cap cut the completion off.
      advantages: f32[B], or f32[B, T] for advantages of single tokens; None until `objective.prepare` has run.
      reference_logprobs: f32[B, T] of the frozen starting policy; None if no KL term needs them.
      importance: f32[B, T] constant weights of the policy term; None for 1 (see `ratios.correct_for_gap`).
    """

    tokens: jax.Array
    mask: jax.Array
    groups: jax.Array
    old_logprobs: jax.Array
    rewards: jax.Array
    truncated: jax.Array
    advantages: jax.Array | None = None
    reference_logprobs: jax.Array | None = None
    importance: jax.Array | None = None


class Mean(NamedTuple):
    """A mean kept as its two sums, so that those of micro-batches and devices add up.

    Attributes:
      total: f32[] weighted sum; weight: f32[] sum of the weights.
    """

    total: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """f32[], 0 where nothing was counted."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1.0)

    @property
    def measured(self) -> float | None:
        """The value on the host, None where nothing was counted."""
        return float(self.value) if float(self.weight) > 0 else None


class Denominators(NamedTuple):
    """What the losses of all parts of one optimiser step are divided by.

    Attributes:
      rows: f32[] completions with at least one token that counts, at least 1.
      tokens: f32[] tokens that count, at least 1.
    """

    rows: jax.Array
    tokens: jax.Array


def denominators(mask: jax.Array) -> Denominators:
    """Counts over the whole step; take them before it is cut into micro-batches.

    A completion without counted tokens (filling, masked as overlong, dropped by dynamic sampling) is left out of the
    row count: a step in which many are left out would otherwise be a smaller step.

    Args:
      mask: f32[B, T] of all completions of the step.
    """
    rows = jnp.sum(jnp.any(mask > 0, axis=1).astype(jnp.float32))
    return Denominators(jnp.maximum(rows, 1.0), jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0))


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean over the tokens (or rows) that count, both arrays of one shape; values elsewhere may be anything."""
    mask = mask.astype(jnp.float32)
    return Mean(jnp.sum(jnp.where(mask > 0, values, 0.0) * mask), jnp.sum(mask))


def add_means(*parts: dict[str, Mean]) -> dict[str, Mean]:
    """Metrics of the whole from those of its parts, which must have the same names."""
    return jax.tree.map(lambda *sums: sum(sums), *parts)
