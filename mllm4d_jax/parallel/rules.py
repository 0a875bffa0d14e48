"""THE table that maps logical parameter axes to mesh axes, and the one way to lay rows of a batch over the devices.

Modules name the dimensions of their parameters (`logical_axes`); nothing else in the project decides where a weight
lives. A dimension that the mesh axis does not divide is replicated, so that small norms and odd widths need no rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. The loss lays the head out anew, over its vocabulary alone (`products.py`): a head
# split over its width would be gathered whole for every logit. What that moves is a device's own share of the head.
RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": None,
    "rank": None,
}

BATCH_AXES = ("data", "fsdp")  # mesh axes over which rows of a batch are split


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Placement of one parameter.

    Args:
      axes: a logical name (or None) per dimension.
      shape: its global shape.
      mesh: the device mesh.

    Raises:
      ValueError: an axis name has no rule, or names and dimensions differ in number.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {tuple(axes)} for shape {tuple(shape)}")
    entries = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} has no rule (known: {', '.join(RULES)})")
        target = RULES[name] if name else None
        fits = target is not None and mesh.shape.get(target, 1) > 1 and size % mesh.shape[target] == 0
        entries.append(target if fits else None)
    return PartitionSpec(*entries)


def parameter_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`partition_spec` bound to the mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def batch_sharding(mesh: Mesh, rank: int, batch_dim: int = 0) -> NamedSharding:
    """Sharding of a batch array of `rank` dimensions whose rows are dimension `batch_dim`."""
    entries: list = [None] * rank
    entries[batch_dim] = BATCH_AXES
    return NamedSharding(mesh, PartitionSpec(*entries))


def batch_shards(mesh: Mesh) -> int:
    """Number of parts the rows of a batch are split into."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def split_rows(mesh: Mesh | None, batch: int) -> tuple[str, ...] | None:
    """Mesh axes over which the rows of a batch are split by hand; None where they cannot be divided evenly."""
    if mesh is None or batch % batch_shards(mesh):
        return None
    return tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1) or None


def split_attention(
    mesh: Mesh | None, batch: int, heads: int, kv_heads: int
) -> tuple[tuple[str, ...] | None, str | None]:
    """Mesh axes over which kernels of attention split rows and heads; None where they cannot be divided evenly."""
    if mesh is None:
        return None, None
    axis = RULES["heads"]
    tensor = mesh.shape.get(axis, 1)
    divides = tensor > 1 and heads % tensor == 0 and kv_heads % tensor == 0
    return split_rows(mesh, batch), axis if divides else None


def constrain(x: jax.Array, mesh: Mesh | None, *entries: str | tuple[str, ...] | None) -> jax.Array:
    """Has XLA lay `x` out like this inside a jitted function; `x` itself without a mesh of several devices.

    Args:
      entries: mesh axes of the leading dimensions; the others are not split. Parts may be of unequal size.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*entries)))


def constrain_rows(x: jax.Array, mesh: Mesh | None, dim: int = 0) -> jax.Array:
    """Keeps dimension `dim` split like the rows of a batch, if it can be; else leaves `x` to XLA.

    Stated wherever XLA could otherwise decide to split activations over their width, as the weights are.
    """
    if mesh is None or x.shape[dim] % batch_shards(mesh):
        return x
    return constrain(x, mesh, *[None] * dim, BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
