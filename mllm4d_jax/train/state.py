"""What a run trains and how: the split of the model, the learning-rate schedule, the optimiser and its state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.parallel.rules import replicated

SCHEDULES = ("cosine", "constant")

# Names for lists of patterns, see `trained`. The vision tower is in none of them.
TRAINABLE: Mapping[str, tuple[str, ...]] = {
    "lora": (r"(.*/)?lora_[ab]",),
    "full": (r"text/.*", r"lm_head/.*"),
}


class TrainableError(ValueError):
    """`train.trainable` does not fit the model."""


def trained(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter is trained: the last pattern that matches its whole name decides.

    Args:
      name: path in the model joined by "/", e.g. "text/stacks/0/attn/q_proj/lora_a" or "vision/merger/mlp/fc1/kernel".
      patterns: regular expressions, or names of `TRAINABLE`; one with "!" before it excludes what it matches.
    """
    result = False
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        if any(re.fullmatch(p, name) for p in TRAINABLE.get(bare, (bare,))):
            result = bare == pattern
    return result


def split_model(
    model: nnx.Module, trainable: str | Sequence[str] = "lora"
) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """(graphdef, trainable, frozen): what is trained and everything else, as nested dicts of arrays.

    Trained weights are float32 copies, so that small updates are not lost to a 16-bit dtype; `merge_model` makes the
    model of these trees. This is the only place where the trainer sees modules; the jitted steps are functions of the
    trees.

    Args:
      model: with adapters, if they are to be trained.
      trainable: patterns, see `trained`.

    Raises:
      TrainableError: a pattern is no regular expression or matches no parameter, or nothing is left to train.
    """
    patterns = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    for pattern in patterns:
        try:
            unused = not any(trained(name, [pattern.removeprefix("!")]) for name in names)
        except re.error as error:
            raise TrainableError(f"train.trainable: {pattern!r} is not a regular expression: {error}") from error
        if unused:
            hint = ": attach an adapter first" if pattern == "lora" else f" (names are like {names[0]!r})"
            raise TrainableError(f"train.trainable: {pattern!r} matches no parameter of the model{hint}")

    def chosen(path: tuple, value: Any) -> bool:
        return isinstance(value, nnx.Param) and trained("/".join(map(str, path)), patterns)

    graphdef, ours, frozen = nnx.split(model, chosen, ...)
    if not jax.tree.leaves(ours):
        raise TrainableError(f"train.trainable = {list(patterns)} leaves nothing to train")
    return graphdef, jax.tree.map(_in_float32, nnx.to_pure_dict(ours)), nnx.to_pure_dict(frozen)


def _in_float32(x: Any) -> Any:
    """An array, or the shape of one."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
    return x if x.dtype == jnp.float32 else x.astype(jnp.float32)


def merge_model(graphdef: nnx.GraphDef, *trees: Any) -> nnx.Module:
    """The model of the trees of `split_model`, with trained weights rounded to the dtype the model computes in.

    Adapters stay in float32; their layers cast them where they are used.
    """
    model = nnx.merge(graphdef, *trees)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and not isinstance(node, nnx.LoRAParam) and node.dtype != model.dtype:
            node.set_value(node.get_value().astype(model.dtype))
    return model


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


def optimizer_placement(optimizer: optax.GradientTransformation, trainable: Any, mesh: Mesh) -> Any:
    """Shardings of the optimiser's state: moments like the parameters they belong to, counters on every device.

    Args:
      trainable: arrays, or shapes with shardings.
    """
    shardings = jax.tree.map(lambda x: x.sharding, trainable)
    everywhere = replicated(mesh)
    return optax.tree_map_params(
        optimizer,
        lambda _, s: s,
        jax.eval_shape(optimizer.init, trainable),
        shardings,
        transform_non_params=lambda _: everywhere,
    )


def init_optimizer(optimizer: optax.GradientTransformation, trainable: Any, mesh: Mesh) -> Any:
    """The optimiser's first state, placed as `optimizer_placement` says."""
    return jax.jit(optimizer.init, out_shardings=optimizer_placement(optimizer, trainable, mesh))(trainable)
