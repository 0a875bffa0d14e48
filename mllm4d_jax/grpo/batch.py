"""The one batch type that every objective reads, and sums that can be added up over its parts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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


def micro_batches(batch: RolloutBatch, count: int) -> list[RolloutBatch]:
    """Cuts the rows into `count` equal parts, in order.

    Advantages and importance weights must be there already: a part does not see its whole groups.

    Raises:
      ValueError: the rows cannot be divided equally, or advantages are missing.
    """
    rows = batch.mask.shape[0]
    if count < 1 or rows % count:
        raise ValueError(f"{rows} completions cannot be cut into {count} equal micro-batches")
    if batch.advantages is None:
        raise ValueError("compute the advantages (objective.prepare) before cutting the batch: groups may be torn")
    size = rows // count
    return [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch) for i in range(count)]


def check_batch(batch: RolloutBatch) -> None:
    """Looks at a batch on the host before it goes to the devices.

    Raises:
      ValueError: a shape does not fit, the mask is not 0/1, or a number that counts is not finite. Names the field and
        the first bad row.
    """
    shape = batch.mask.shape
    if len(shape) != 2:
        raise ValueError(f"mask: expected [completions, tokens], got shape {shape}")
    expected = {"tokens": shape, "old_logprobs": shape, "reference_logprobs": shape, "importance": shape}
    expected |= {"groups": shape[:1], "rewards": shape[:1], "truncated": shape[:1]}
    for name, wanted in expected.items():
        value = getattr(batch, name)
        if value is not None and value.shape != wanted:
            raise ValueError(f"{name}: shape {value.shape} does not fit a mask of {shape}, expected {wanted}")
    if batch.advantages is not None and batch.advantages.shape not in (shape[:1], shape):
        raise ValueError(f"advantages: shape {batch.advantages.shape}, expected {shape[:1]} or {shape}")
    mask = np.asarray(batch.mask)
    _first_bad("mask", ~np.isin(mask, (0, 1)), "is neither 0 nor 1")
    _first_bad("groups", (np.asarray(batch.groups) < 0) & (mask > 0).any(1), "is negative in a row with tokens")
    for name in ("old_logprobs", "reference_logprobs", "importance", "advantages"):
        value = getattr(batch, name)
        if value is not None:
            counts = mask > 0 if value.ndim == 2 else np.asarray(batch.groups) >= 0
            _first_bad(name, ~np.isfinite(np.asarray(value)) & counts, "is not finite")
    _first_bad("rewards", ~np.isfinite(np.asarray(batch.rewards)), "is not finite")


def _first_bad(name: str, bad: np.ndarray, what: str) -> None:
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name}[{', '.join(map(str, where))}] {what} ({int(bad.sum())} such values in the batch)")
