"""Leaf modules, the dense feed-forward layer, and the layer stack.

Every parameter carries `logical_axes`, a name per dimension; `parallel/rules.py` turns the names into mesh axes. Axes:
"layers", "embed" (model width), "heads" (attention width), "kv" (key/value width), "mlp", "vocab", "experts",
"rank" (LoRA); None for a dimension that is never split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Axes = tuple[str | None, ...]
# Names under which layers offer results to a remat policy: of attention (and the log-sum-exp that a kernel's backward
# pass takes), of the products into the inner width of a feed-forward layer, and of all other products with weights.
ATTENTION, MLP, PRODUCT = "attention", "mlp", "product"
# Policy -> what is kept of a layer besides its input.
KEPT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"dots": (ATTENTION, PRODUCT, MLP), "dots_except_mlp": (ATTENTION, PRODUCT), "full": ()}
)
REMAT = ("none", *KEPT)  # from the one that keeps most, and is fastest, to the one that keeps least


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], dtype, axes: Axes, init: str | float = 0.02) -> nnx.Param:
    """A parameter with logical axes; `init` is "ones", "zeros" or the standard deviation of a normal."""
    if isinstance(init, str):
        value = {"ones": jnp.ones, "zeros": jnp.zeros}[init](shape, dtype)
    else:
        value = (jax.random.normal(rngs.params(), shape, jnp.float32) * init).astype(dtype)
    return nnx.Param(value, logical_axes=axes)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """x with each entry zero with probability `rate` and divided by `1 - rate` otherwise."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def fold(key: jax.Array | None, number: jax.Array | int) -> jax.Array | None:
    """The key of a numbered part; no key has no parts."""
    return None if key is None else jax.random.fold_in(key, number)


class Linear(nnx.Module):
    """y = x W + b, W stored [in, out], optionally with a low-rank adapter (see `models/split.py`).

    The adapter is fp32 and is cast to the activation dtype, as mixed-precision adapters are elsewhere; the base product
    is never re-materialised with the adapter merged. `name` is what a remat policy knows the result as: the sum of both
    products, since a policy that kept either would keep twice as much; None where something made of it is kept.
    """

    def __init__(
        self, d_in: int, d_out: int, *, axes: Axes, bias: bool, dtype, rngs: nnx.Rngs, name: str | None = PRODUCT
    ):
        self.kernel = parameter(rngs, (d_in, d_out), dtype, axes)
        self.bias = parameter(rngs, (d_out,), dtype, axes[1:], "zeros") if bias else None
        self.lora_a, self.lora_b = nnx.data(None), nnx.data(None)
        self.lora_scale = self.lora_dropout = 0.0
        self.name = name

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]; a random key drops some of the adapter's inputs, None (not in training) none."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None:
            seen = x if key is None or not self.lora_dropout else dropout(x, self.lora_dropout, key)
            # Scaled while it is narrow: XLA can then add the second product to the base's without another pass over y.
            low = seen @ self.lora_a[...].astype(x.dtype) * jnp.asarray(self.lora_scale, x.dtype)
            y = y + checkpoint_name(low, PRODUCT) @ self.lora_b[...].astype(x.dtype)
        return y if self.name is None else checkpoint_name(y, self.name)


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
        self.gate_proj = Linear(width, hidden, axes=("embed", "mlp"), name=MLP, **kw)
        self.up_proj = Linear(width, hidden, axes=("embed", "mlp"), name=MLP, **kw)
        self.down_proj = Linear(hidden, width, axes=("mlp", "embed"), **kw)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        gate, up = self.gate_proj(x, fold(key, 0)), self.up_proj(x, fold(key, 1))
        return self.down_proj(jax.nn.silu(gate) * up, fold(key, 2))


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules as one whose parameters have a leading "layers" dimension, for `jax.lax.scan`."""
    blocks = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(layers))
    for _, node in nnx.iter_graph(blocks):
        if isinstance(node, nnx.Variable):
            node.set_metadata(logical_axes=("layers", *node.get_metadata("logical_axes")))
    return blocks


def scan_layers(blocks: nnx.Module, step: Callable, carry, xs, *, remat: str = "none", unroll: bool = False):
    """Scans `step(block, carry, x) -> (carry, y)` over stacked blocks: one compiled body for all layers.

    Args:
      blocks: a module made by `stack`.
      xs: per-layer inputs, a pytree with a leading layer dimension.
      unroll: a body for each layer, for GPUs. Compiling takes seconds more for each; in return nothing is copied out of
        the stacked weights, nor what is kept for the backward pass into a stack and out of it again: 19.7 ms a layer in
        place of 21.4 for a gradient of 4 rows by "dots" on an H100 (jax 0.11.2).
      remat: what is kept of each layer for the backward pass besides its input: "none" everything, "full" nothing,
        "dots" the results of its products with weights and of its attention, "dots_except_mlp" these without the
        products into the feed-forward layer's inner width.

    Kept and computed again, for Qwen3-VL-8B in bfloat16 (width 4,096, inner 12,288, 36 layers; 193 M weights a layer):

    | policy | numbers a token and layer | GiB of 23,552 tokens (8 rows of 1,024 + 20 x 96) | weights passed again |
    | --- | --- | --- | --- |
    | full | 4,096 | 6.5 | 143 M (all but the last product, which nothing backward needs) and attention |
    | dots_except_mlp | 18,944 | 29.9 | 101 M (gate and up) |
    | dots | 43,520 | 68.7 | none |

    With 16.4 GB of weights and 5 GiB for what is alive anyway, 80 GB hold 8 rows by "dots_except_mlp" and 4 by "dots".
    """
    if remat not in REMAT:
        raise ValueError(f"unknown remat policy {remat!r} (known: {', '.join(REMAT)})")
    graphdef, state = nnx.split(blocks)

    def body(carry, layer):
        layer_state, x = layer
        return step(nnx.merge(graphdef, layer_state), carry, x)

    if remat != "none":
        # Between the two loops of a scan nothing can be taken for the same; a barrier would only have what was kept
        # copied from its stack before it is used.
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
        body = jax.checkpoint(body, policy=policy, prevent_cse=unroll)
    if not unroll:
        return jax.lax.scan(body, carry, (state, xs))
    outputs = []
    for layer in _apart((state, xs)):
        carry, y = body(carry, layer)
        outputs.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *outputs)


def _apart(stacked) -> list:
    """Trees of the layers. An array is split once, so that its gradient is joined once, not added up layer by layer."""
    leaves, tree = jax.tree.flatten(stacked)
    parts = [[x[0] for x in jax.lax.split(jnp.asarray(leaf), [1] * len(leaf))] for leaf in leaves]
    return [jax.tree.unflatten(tree, layer) for layer in zip(*parts, strict=True)]
