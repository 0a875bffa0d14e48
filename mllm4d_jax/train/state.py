"""What a run trains and how: the split of the model, the learning-rate schedule, the optimiser and its state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.parallel.rules import replicated

SCHEDULES = ("cosine", "constant")


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """(graphdef, lora, frozen): the adapter and everything else, as nested dicts of arrays.

    `nnx.merge(graphdef, lora, frozen)` is the model again. This is the only place where the trainer sees modules; the
    jitted steps are functions of these trees.

    Raises:
      ValueError: the model has no adapter.
    """
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    if not jax.tree.leaves(lora):
        raise ValueError("the model has no LoRA parameters: attach an adapter first")
    return graphdef, nnx.to_pure_dict(lora), nnx.to_pure_dict(frozen)


def learning_rates(peak: float, steps: int, warmup_ratio: float, schedule: str) -> np.ndarray:
    """Learning rate of every step: f32[steps].

    The first `ceil(warmup_ratio * steps)` steps rise linearly, step k of them at `peak * k / warm-up` (so step 0 is at
    zero); then half a cosine down to zero over the rest, or a constant. Same numbers as the Hugging Face schedules the
    release was trained with.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r} (known: {', '.join(SCHEDULES)})")
    k = np.arange(steps, dtype=np.float64)
    warmup = int(np.ceil(warmup_ratio * steps))
    share = (k - warmup) / max(1, steps - warmup)
    after = 0.5 * (1 + np.cos(np.pi * share)) if schedule == "cosine" else np.ones(steps)
    return (peak * np.where(k < warmup, k / max(1, warmup), after)).astype(np.float32)


def make_optimizer(
    rates: np.ndarray, *, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to a global norm.

    Args:
      rates: f32[steps] learning rate of every step; the last one holds afterwards.
      clip_norm: largest global gradient norm.
    """
    table = jnp.asarray(rates)

    def schedule(count: jax.Array) -> jax.Array:
        return table[jnp.minimum(count, len(rates) - 1)]

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )


def init_optimizer(optimizer: optax.GradientTransformation, lora: Any, mesh: Mesh) -> Any:
    """Optimiser state placed like the parameters it belongs to; counters on every device."""
    shardings = jax.tree.map(lambda x: x.sharding, lora)
    abstract = jax.eval_shape(optimizer.init, lora)
    everywhere = replicated(mesh)
    placed = optax.tree_map_params(
        optimizer, lambda _, s: s, abstract, shardings, transform_non_params=lambda _: everywhere
    )
    return jax.jit(optimizer.init, out_shardings=placed)(lora)
