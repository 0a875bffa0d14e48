"""Leaf modules and the layer stack.

Every parameter carries `logical_axes`, a name per dimension; `parallel/rules.py` turns the names into mesh axes. Axes:
"layers", "embed" (model width), "heads" (attention width), "kv" (key/value width), "mlp", "vocab", "experts",
"rank" (LoRA); None for a dimension that is never split.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], dtype, axes: Axes, init: str | float = 0.02) -> nnx.Param:
    """A parameter with logical axes; `init` is "ones", "zeros" or the standard deviation of a normal."""
    if init == "ones":
        value = jnp.ones(shape, dtype)
    elif init == "zeros":
        value = jnp.zeros(shape, dtype)
    else:
        value = (jax.random.normal(rngs.params(), shape, jnp.float32) * init).astype(dtype)
    return nnx.Param(value, logical_axes=axes)


class Linear(nnx.Module):
    """y = x W + b, W stored [in, out], optionally with a low-rank adapter (see `models/lora.py`).

    The adapter is fp32 and is cast to the activation dtype, as mixed-precision adapters are elsewhere; the base product
    is never re-materialised with the adapter merged.
    """

    def __init__(self, d_in: int, d_out: int, *, axes: Axes, bias: bool, dtype, rngs: nnx.Rngs):
        self.kernel = parameter(rngs, (d_in, d_out), dtype, axes)
        self.bias = parameter(rngs, (d_out,), dtype, axes[1:], "zeros") if bias else None
        self.lora_a = nnx.data(None)
        self.lora_b = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None:
            low = (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
            y = y + low * jnp.asarray(self.lora_scale, x.dtype)
        return y


class RMSNorm(nnx.Module):
    """Root-mean-square norm: statistics in fp32, cast back, then scaled by the weight."""

    def __init__(self, width: int, eps: float, *, dtype, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (width,), dtype, (None,), "ones")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias, fp32 inside, output in the activation dtype."""

    def __init__(self, width: int, eps: float, *, dtype, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (width,), dtype, (None,), "ones")
        self.bias = parameter(rngs, (width,), dtype, (None,), "zeros")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        kw = dict(bias=bias, dtype=dtype, rngs=rngs)
        self.gate_proj = Linear(width, hidden, axes=("embed", "mlp"), **kw)
        self.up_proj = Linear(width, hidden, axes=("embed", "mlp"), **kw)
        self.down_proj = Linear(hidden, width, axes=("mlp", "embed"), **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules as one whose parameters have a leading "layers" dimension, for `jax.lax.scan`."""
    blocks = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(layers))
    for _, node in nnx.iter_graph(blocks):
        if isinstance(node, nnx.Variable):
            node.set_metadata(logical_axes=("layers", *node.get_metadata("logical_axes")))
    return blocks


def scan_layers(
    blocks: nnx.Module,
    step: Callable,
    carry,
    xs,
    *,
    remat: str = "none",
):
    """Scans `step(block, carry, x) -> (carry, y)` over stacked blocks: one compiled body for all layers.

    Args:
      blocks: a module made by `stack`.
      xs: per-layer inputs, a pytree with a leading layer dimension.
      remat: "none", or "full" to keep only the carry of each layer for the backward pass.
    """
    graphdef, state = nnx.split(blocks)

    def body(carry, layer):
        layer_state, x = layer
        return step(nnx.merge(graphdef, layer_state), carry, x)

    if remat == "full":
        body = jax.checkpoint(body)
    elif remat != "none":
        raise ValueError(f"unknown remat policy {remat!r} (known: none, full)")
    return jax.lax.scan(body, carry, (state, xs))
