"""What a run trains and how: the split of the model, the learning-rate schedule, the optimiser and its state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
