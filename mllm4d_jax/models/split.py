"""What a run trains: low-rank adapters (arXiv 2106.09685) put on the model, and its split into trained and frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.parallel.place import put
from mllm4d_jax.parallel.rules import parameter_sharding

# Names for lists of patterns, see `trained`. The vision tower is in none of them.
TRAINABLE: Mapping[str, tuple[str, ...]] = {
    "lora": (r"(.*/)?lora_[ab]",),
    "full": (r"text/.*", r"lm_head/.*"),
}


class TrainableError(ValueError):
    """`train.trainable` does not fit the model."""


def needs_adapter(patterns: Sequence[str]) -> bool:
    """Return whether `train.trainable` trains something of an adapter: the name "lora", or a pattern for its leaves."""
    return any("lora" in pattern for pattern in patterns)


def attach_lora(
    model: QwenVL,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    dropout: float = 0.0,
    rngs: nnx.Rngs,
    mesh: Mesh | None = None,
) -> None:
    """Adds adapters `y += (alpha / rank) * x A B` in place to the decoder's linear layers named in `targets`.

    A is uniform in +-1/sqrt(d_in) and B is zero, so the model's output does not change. Both are fp32 `nnx.LoRAParam`s
    with the same leading layer dimension as the frozen kernel, which is not copied. The vision tower gets none.

    Args:
      targets: last name of the module path, e.g. "q_proj" or "down_proj".
      dropout: probability with which an input of an adapter is dropped in training (the base layer sees them all).
      mesh: places the adapters by the same rules as the weights.

    Raises:
      ValueError: a target names no linear layer of the decoder, rank is below 1, or dropout is outside [0, 1).
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA dropout must be at least 0 and below 1, got {dropout}")
    modules = [(path, m) for path, m in nnx.iter_modules(model.text) if isinstance(m, Linear)]
    known = {path[-1] for path, _ in modules}
    if set(targets) - known:
        raise ValueError(f"LoRA targets {sorted(set(targets) - known)} name no linear layer (known: {sorted(known)})")
    for path, module in modules:
        if path[-1] not in targets:
            continue
        *lead, d_in, d_out = module.kernel.shape
        axes = module.kernel.get_metadata("logical_axes")
        bound = d_in**-0.5
        a = jax.random.uniform(rngs.params(), (*lead, d_in, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*lead, rank, d_out), jnp.float32)
        module.lora_a = _adapter(a, (*axes[:-1], "rank"), mesh)
        module.lora_b = _adapter(b, (*axes[:-2], "rank", axes[-1]), mesh)
        module.lora_scale, module.lora_dropout = alpha / rank, dropout


def _adapter(value: jax.Array, axes: tuple, mesh: Mesh | None) -> nnx.LoRAParam:
    if mesh is not None:
        value = put(value, parameter_sharding(axes, value.shape, mesh))
    return nnx.LoRAParam(value, logical_axes=axes)


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
