"""Low-rank adapters on the stacked projections of the decoder (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.parallel.rules import parameter_sharding


def attach_lora(
    model: QwenVL,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    dropout: float = 0.0,
    rngs: nnx.Rngs,
    mesh: Mesh | None = None,
) -> int:
    """Adds adapters `y += (alpha / rank) * x A B` in place to the decoder's linear layers named in `targets`.

    A is uniform in +-1/sqrt(d_in) and B is zero, so the model's output does not change. Both are fp32 `nnx.LoRAParam`s
    with the same leading layer dimension as the frozen kernel, which is not copied. The vision tower gets none.

    Args:
      targets: last name of the module path, e.g. "q_proj" or "down_proj".
      dropout: probability with which an input of an adapter is dropped in training (the base layer sees them all).
      mesh: places the adapters by the same rules as the weights.

    Returns:
      The number of trainable parameters added.

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
    added = 0
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
        added += a.size + b.size
    return added


def _adapter(value: jax.Array, axes: tuple, mesh: Mesh | None) -> nnx.LoRAParam:
    if mesh is not None:
        value = jax.device_put(value, parameter_sharding(axes, value.shape, mesh))
    return nnx.LoRAParam(value, logical_axes=axes)
