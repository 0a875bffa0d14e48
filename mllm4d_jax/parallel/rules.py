"""THE table that maps logical parameter axes to mesh axes, and the one way to lay rows of a batch over the devices.

Modules name the dimensions of their parameters (`logical_axes`); nothing else in the project decides where a weight
lives. A dimension that the mesh axis does not divide is replicated, so that small norms and odd widths need no rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm4d_jax.parallel.mesh import MeshError

# Logical axis -> mesh axis. The loss lays the head out anew, over its vocabulary alone (`sft/losses.py`): a head
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
# Arrays whose rows (or frames, or features, row by row) are not their first dimension, by the name of their field.
_ROW_DIMENSION = {"positions": 1, "deepstack": 1}


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


def row_shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of every array (or shape) of a tree of rows.

    An array is split over the batch axes along the dimension that counts rows where they divide it; otherwise every
    device holds it whole.

    Args:
      tree: arrays or shapes; named tuples such as `rows.rows.RowBatch`, `VisionInputs` or `VisionFeatures`.
    """

    def sharding(path: tuple, x: Any) -> NamedSharding:
        dim = _row_dimension(path)
        return batch_sharding(mesh, len(x.shape), dim) if x.shape[dim] % batch_shards(mesh) == 0 else replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Put a tree of rows on the devices; of several processes each gives its part of the rows, in their order.

    Args:
      tree: see `row_shardings`; arrays on the host or on devices.
      mesh: None leaves the tree as it is.

    Raises:
      MeshError: the rows of several processes cannot be split evenly over the devices.
    """
    if mesh is None:
        return tree
    processes = len({device.process_index for device in mesh.devices.flat})
    if processes == 1:
        return jax.device_put(tree, row_shardings(tree, mesh))
    shards = batch_shards(mesh)

    def whole(path: tuple, x: Any) -> jax.Array:
        dim = _row_dimension(path)
        if x.shape[dim] * processes % shards or shards % processes:
            raise MeshError(
                f"{processes} processes x {x.shape[dim]} rows cannot be split over {shards} parts (mesh data x fsdp)"
            )
        shape = (*x.shape[:dim], x.shape[dim] * processes, *x.shape[dim + 1 :])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, x.ndim, dim), x, shape)

    return jax.tree_util.tree_map_with_path(whole, tree)


def placed(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Return the shape of an array (or of a shape) on the devices."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _row_dimension(path: tuple) -> int:
    return _ROW_DIMENSION.get(getattr(path[-1], "name", ""), 0) if path else 0
