"""The sparse feed-forward layer (mixture of experts), and the loss that balances its experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mllm4d_jax.models.attention import Backend
from mllm4d_jax.models.config import MoEConfig
from mllm4d_jax.models.grouped import grouped_product
from mllm4d_jax.models.layers import MLP, PRODUCT, parameter
from mllm4d_jax.parallel.rules import split_rows


class RouterStats(NamedTuple):
    """What the load-balancing loss needs, summed over the real tokens of one layer."""

    assignments: jax.Array  # f32[E] number of tokens routed to each expert
    probabilities: jax.Array  # f32[E] sum of the router probabilities
    tokens: jax.Array  # f32[] number of real tokens


class SparseMLP(nnx.Module):
    """Weighted sum of the top-k experts' gated MLPs: softmax router, no capacity and no dropped token.

    Expert weights keep the published layout: gate_up [E, H, 2I] with the gate columns first, down [E, I, H]. Tokens are
    sorted by expert and multiplied by `grouped_product`, so that cost follows top-k, not the number of experts.
    """

    def __init__(self, width: int, config: MoEConfig, *, dtype, rngs: nnx.Rngs):
        e, i = config.num_experts, config.intermediate_size
        self.router = parameter(rngs, (width, e), dtype, ("embed", None))
        self.gate_up = parameter(rngs, (e, width, 2 * i), dtype, ("experts", "embed", "mlp"))
        self.down = parameter(rngs, (e, i, width), dtype, ("experts", "mlp", "embed"))
        self.top_k = config.top_k

    def __call__(self, x: jax.Array, real: jax.Array, backend: Backend) -> tuple[jax.Array, RouterStats, tuple]:
        """Apply the layer.

        Under a mesh of several devices every device sorts and multiplies its own rows.

        Args:
          x: [B, S, H].
          real: bool[B, S], False for padding (only the statistics look at it).
          backend: its form of grouped products, and the mesh.

        Returns:
          (y [B, S, H], statistics, (router logits, weights, indices) of the B*S tokens).
        """
        experts = self.gate_up.shape[0]
        logits = checkpoint_name(x @ self.router[...].astype(x.dtype), PRODUCT)
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        gate_up, down = (w[...].astype(x.dtype) for w in (self.gate_up, self.down))
        mix = functools.partial(_mix, top_k=self.top_k, form=backend.grouped)
        y, weights, chosen = _by_device(mix, backend, len(x))(x, probs, gate_up, down)

        mask = real[..., None].astype(jnp.float32)
        hits = jax.nn.one_hot(chosen, experts, dtype=jnp.float32).sum(2)
        stats = RouterStats((hits * mask).sum((0, 1)), (probs * mask).sum((0, 1)), mask.sum())
        return y, stats, tuple(t.reshape(-1, t.shape[-1]) for t in (logits, weights, chosen))


def _by_device(mix: Callable[..., tuple], backend: Backend, batch: int) -> Callable[..., tuple]:
    """`_mix` by every device of the mesh for its own rows.

    XLA cannot split kernels: they see whole matrices, and all rows where those cannot be divided. In the xla form only
    rows are split by hand, so that none are sent to be ranked or sorted; what else is split is left to XLA.
    """
    mesh, rows = backend.mesh, split_rows(backend.mesh, batch)
    kernels = backend.grouped != "xla"
    if mesh is None or mesh.size == 1 or not (rows or kernels):
        return mix
    own, whole = PartitionSpec(rows), PartitionSpec()
    return jax.shard_map(
        mix,
        mesh=mesh,
        in_specs=(own, own, whole, whole),
        out_specs=(own, own, own),
        axis_names=set(mesh.axis_names if kernels else rows),
        check_vma=False,  # the kernels' results carry no record of the axes they vary over
    )


def _mix(x, probs, gate_up, down, *, top_k: int, form: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose the `top_k` experts of each token and add up their results by their weights.

    Args:
      x: [B, S, H]; probs: f32[B, S, E]; gate_up: [E, H, 2I]; down: [E, I, H].

    Returns:
      ([B, S, H], weights [B, S, k], experts i32[B, S, k])
    """
    weights, chosen = jax.lax.top_k(probs, top_k)
    weights = (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)
    (b, s, h), k = x.shape, top_k
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.bincount(flat, length=len(gate_up)).astype(jnp.int32)
    rows = _permuted(jnp.broadcast_to(x[:, :, None], (b, s, k, h)).reshape(-1, h), order, inverse)
    inner = checkpoint_name(grouped_product(rows, gate_up, sizes, form), MLP)
    gate, up = jnp.split(inner, 2, axis=-1)
    out = grouped_product(jax.nn.silu(gate) * up, down, sizes, form)
    out = _permuted(out, inverse, order).reshape(b, s, k, h)
    return jnp.sum(out * weights[..., None], 2, dtype=jnp.float32).astype(x.dtype), weights, chosen


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order] of a permutation, whose gradient is a look-up as well, where JAX's own adds up rows one by one."""
    return x[order]


_permuted.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, pulled: (pulled[inverse], None, None),
)


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """Compute the Switch-style auxiliary loss over all sparse layers pooled: E * sum_e f_e P_e (f sums to top-k).

    Args:
      stats: RouterStats with a leading layer dimension.
    """
    total = stats.tokens.sum()
    fraction = stats.assignments.sum(0) / total
    probability = stats.probabilities.sum(0) / total
    return stats.assignments.shape[-1] * jnp.sum(fraction * probability)
