"""The decoder's blocks as decoding on GPUs wants them: each with arrays of its own, few and large products.

A decode step reads every weight for a few rows, and on GPUs it is bound by that reading and by the number of kernels.
XLA copies a layer's matrices out of stacked ones before it multiplies by them, which is three times the bytes; and it
has a kernel (or three) for every product. The blocks made here have one array a layer, and layers of one input as one
product. They are the model's own numbers, up to the order of summation.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.models import rope
from mllm4d_jax.models.layers import GatedMLP, Linear
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.text import DecoderBlock, KVCache, SelfAttention
from mllm4d_jax.parallel.chips import chip_of
from mllm4d_jax.parallel.place import local_bytes, memory_stats

Layers = tuple[DecoderBlock, ...]
# A scan over the model's own stacked weights; one array a layer; the latter with kernels.
FORMS = ("stacked", "apart", "kernels")
_SHARE = 0.6  # of a device's memory; a model of 8B in 16 bits, twice, is 0.55 of the 64 GB that JAX takes of 80


class JoinedLinear(nnx.Module):
    """Linear layers of one input as one product.

    The kernels lie side by side, beside them the first halves of the adapters; the second halves are the blocks of one
    block-diagonal matrix. Adapters are rounded to the dtype of the activations, as their layers do it on use.
    """

    def __init__(self, layers: Sequence[Linear], dtype) -> None:
        """Copies the weights of the layers."""
        widths = [layer.kernel.shape[-1] for layer in layers]
        adapted = [layer for layer in layers if layer.lora_a is not None]
        ranks = sum(layer.lora_a.shape[-1] for layer in adapted)
        padding = -ranks % 16  # as kernels want them
        parts = [*(layer.kernel[...] for layer in layers), *(layer.lora_a[...] for layer in adapted)]
        parts.append(jnp.zeros((len(parts[0]), padding)))
        self.width = sum(widths)
        self.kernel = nnx.Param(jnp.concatenate([part.astype(dtype) for part in parts], -1))
        self.bias, self.up, self.scale = nnx.data(None), nnx.data(None), nnx.data(None)
        if any(layer.bias is not None for layer in layers):
            parts = [jnp.zeros(n) if x.bias is None else x.bias[...] for x, n in zip(layers, widths, strict=True)]
            self.bias = nnx.Param(jnp.concatenate([part.astype(dtype) for part in parts]))
        if adapted:
            up, row, column = jnp.zeros((ranks + padding, self.width), dtype), 0, 0
            for layer, width in zip(layers, widths, strict=True):
                if layer.lora_b is not None:
                    up = jax.lax.dynamic_update_slice(up, layer.lora_b[...].astype(dtype), (row, column))
                    row += layer.lora_b.shape[0]
                column += width
            scales = [jnp.full(n, layer.lora_scale, dtype) for layer, n in zip(layers, widths, strict=True)]
            self.up, self.scale = nnx.Param(up), nnx.Param(jnp.concatenate(scales))

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out ++ r]: the adapters' first halves behind the layers."""
        return x @ self.kernel[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out of the first layer ++ out of the second ...], without dropout."""
        y, low = jnp.split(self.product(x), (self.width,), -1)
        if self.bias is not None:
            y = y + self.bias[...]
        return y if self.up is None else y + (low @ self.up[...]) * self.scale[...]


class JoinedAttention(nnx.Module):
    """`SelfAttention` with one product for queries, keys and values, and one norm for the heads of the first two."""

    def __init__(self, attention: SelfAttention, dtype, kernels: bool = False) -> None:
        """`kernels`: whether `step` is used, if the heads' size allows it."""
        self.head_dim, d = (attention.head_dim,) * 2
        self.kernels = kernels and d >= 32 and d & (d - 1) == 0
        layers = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv_proj, self.o_proj = JoinedLinear(layers, dtype), JoinedLinear((attention.o_proj,), dtype)
        self.queries, self.keys = (layer.kernel.shape[-1] // d for layer in layers[:2])
        self.norm = attention.q_norm
        if self.norm is not None:
            both = ((self.queries, attention.q_norm), (self.keys, attention.k_norm))
            scales = [jnp.broadcast_to(norm.scale[...], (heads, d)) for heads, norm in both]
            self.norm.scale = nnx.Param(jnp.concatenate(scales))

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `SelfAttention.project`."""
        y = self.qkv_proj(x).reshape(*x.shape[:2], -1, self.head_dim)
        both, v = jnp.split(y, (self.queries + self.keys,), 2)
        both = rope.rotate(both if self.norm is None else self.norm(both), cos, sin)
        return *jnp.split(both, (self.queries,), 2), v

    def step(
        self,
        hidden: jax.Array,
        x: jax.Array,
        tables: tuple[jax.Array, jax.Array],
        prompt: KVCache,
        own: KVCache,
        visible: jax.Array,
        slots: jax.Array,
        asked: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, KVCache]:
        """The first half of a decode step's block by kernels: (hidden + attention of x, own cache with the slots)."""
        from mllm4d_jax.generate import kernels

        p, o, norm = self.qkv_proj, self.o_proj, self.norm
        up, scale, bias = (None if v is None else v[...] for v in (p.up, p.scale, p.bias))
        weight, eps = (None, 0.0) if norm is None else (norm.scale[...], norm.eps)
        q, own = kernels.place(p.product(x), up, scale, bias, weight, eps, tables, own, slots)
        out = kernels.attend(q, prompt, visible, own, slots, asked)
        if o.up is None or o.bias is not None:
            return hidden + o(out), own
        return kernels.add_adapted(o.product(out), o.up[...], o.scale[...], hidden), own


class JoinedMLP(nnx.Module):
    """`GatedMLP` with one product for gate and up."""

    def __init__(self, mlp: GatedMLP, dtype) -> None:
        self.gate_up = JoinedLinear((mlp.gate_proj, mlp.up_proj), dtype)
        self.down_proj = JoinedLinear((mlp.down_proj,), dtype)

    def __call__(self, x: jax.Array, key: None = None) -> jax.Array:
        gate, up = jnp.split(self.gate_up(x), 2, -1)
        return self.down_proj(jax.nn.silu(gate) * up)


def choose_form(mesh: Mesh | None, weights: Any) -> str:
    """The form of decoding, of `FORMS`.

    On GPUs layers are taken apart, if weights and copy leave room for the rest of a run. One GPU also has kernels, if
    it is here and of a kind that they are for (not on a mesh, which XLA splits programs over, but no kernels).

    Args:
      mesh: the devices, here or not; None for one of this process.
      weights: arrays, or shapes with shardings. What else is in memory does not matter, so that it is always the same
        program for the same weights.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform != "gpu":
        return "stacked"
    chip = chip_of(device.device_kind)
    # Other processes' devices do not answer, and all processes have to decide alike.
    answers = device in jax.devices() and jax.process_count() == 1
    known = chip.hbm if chip else 0
    limit = memory_stats(device).get("bytes_limit", known) if answers else known
    if not fits_twice(local_bytes(weights), limit):
        return "stacked"
    one = answers and (mesh is None or mesh.devices.size == 1)
    return "kernels" if one and _has_kernels(device) else "apart"


def fits_twice(weights: int, limit: int) -> bool:
    """Whether a GPU with `limit` bytes of memory has room for `weights` bytes, for layers apart, and for a run."""
    return 2 * weights <= _SHARE * limit


def _has_kernels(device: jax.Device) -> bool:
    """An NVIDIA GPU from Ampere on, and a JAX that they were run with and that has Pallas for Triton still."""
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    triton = importlib.util.find_spec("jax.experimental.pallas.triton")
    known = jax.__version_info__ >= (0, 11) and triton is not None
    return known and capability is not None and int(capability[1]) >= 8


def layers_apart(model: QwenVL, kernels: bool = False) -> Layers:
    """The decoder's blocks, each with weights of its own: a copy. With `kernels`, attention uses them.

    Products are not joined on a mesh that splits them: the parts of a device would lie elsewhere.
    """
    whole = model.mesh is None or model.mesh.shape.get("tensor", 1) == 1
    blocks = []
    for stacked in model.text.stacks:
        graphdef, state = nnx.split(stacked)
        for n in range(len(jax.tree.leaves(state)[0])):
            block = nnx.merge(graphdef, jax.tree.map(lambda x, n=n: x[n], state))
            if whole:
                block.attn = JoinedAttention(block.attn, model.dtype, kernels)
                if not block.sparse:
                    block.mlp = JoinedMLP(block.mlp, model.dtype)
            blocks.append(block)
    return tuple(blocks)
