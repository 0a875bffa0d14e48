"""Rows of a batch on the devices: split over the batch axes, the one way for training, scoring and sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mllm4d_jax.parallel.mesh import own_part, process_count
from mllm4d_jax.parallel.rules import batch_sharding, batch_shards, replicated

# Arrays whose rows (or frames, or features, row by row) are not their first dimension, by the name of their field.
ROW_DIMENSION: Mapping[str, int] = MappingProxyType({"positions": 1, "deepstack": 1})


class PlaceError(ValueError):
    """Rows that cannot be split over the devices."""


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
      PlaceError: the rows of several processes cannot be split evenly over the devices.
    """
    if mesh is None:
        return tree
    processes = process_count(mesh)
    if processes == 1:
        return jax.device_put(tree, row_shardings(tree, mesh))
    shards = batch_shards(mesh)

    def whole(path: tuple, x: Any) -> jax.Array:
        dim = _row_dimension(path)
        if x.shape[dim] * processes % shards or shards % processes:
            raise PlaceError(
                f"{processes} processes x {x.shape[dim]} rows cannot be split over {shards} parts (mesh data x fsdp)"
            )
        shape = (*x.shape[:dim], x.shape[dim] * processes, *x.shape[dim + 1 :])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, x.ndim, dim), x, shape)

    return jax.tree_util.tree_map_with_path(whole, tree)


def split_rows(tree: Any, parts: int) -> list[Any]:
    """Return a tree of rows in so many pieces, each with as many rows, in their order; see `row_shardings`."""
    if parts == 1:
        return [tree]
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    pieces = [np.split(x, parts, axis=_row_dimension(path)) for path, x in leaves]
    return [structure.unflatten(piece) for piece in zip(*pieces, strict=True)]


def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Put an array that every process of the run has whole, and all of them alike, on the devices of a sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)  # device_put would have the processes compare it first, and leaves an array of arrays (jax 0.10)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Put arrays that every process has, and all of them alike, whole on every device."""
    return jax.tree.map(lambda x: put(x, replicated(mesh)), tree)


def join_rows(tree: Any, mesh: Mesh) -> Any:
    """Put rows that are on the devices of each process on those of all, as `place_rows` does with rows of the host.

    Args:
      tree: see `row_shardings`; of each process, equally many rows, which its part of the mesh divides.
      mesh: over several processes.
    """
    own, processes = own_part(mesh), process_count(mesh)

    def whole(path: tuple, x: jax.Array) -> jax.Array:
        dim = _row_dimension(path)
        shape = (*x.shape[:dim], x.shape[dim] * processes, *x.shape[dim + 1 :])
        parts = [s.data for s in jax.device_put(x, batch_sharding(own, x.ndim, dim)).addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, batch_sharding(mesh, x.ndim, dim), parts)

    return jax.tree_util.tree_map_with_path(whole, tree)


def own_copies(tree: Any, mesh: Mesh) -> Any:
    """Return arrays as this process alone sees them, on its own part of their mesh; nothing is moved.

    Args:
      tree: arrays (or shapes) that are not split over the batch axes, so that every process has them whole.
      mesh: `own_part` of theirs.
    """

    def own(x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, x.sharding.spec)
        if isinstance(x, jax.ShapeDtypeStruct):
            return placed(x, sharding)
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(own, tree)


def placed(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Return the shape of an array (or of a shape) on the devices."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def repeated(tree: Any, times: int) -> Any:
    """Return the shapes of `times` as many rows as a tree has.

    Args:
      tree: arrays or shapes of a few rows, see `row_shardings`.
    """

    def shape(path: tuple, x: Any) -> jax.ShapeDtypeStruct:
        dim = _row_dimension(path)
        return jax.ShapeDtypeStruct((*x.shape[:dim], times * x.shape[dim], *x.shape[dim + 1 :]), x.dtype)

    return jax.tree_util.tree_map_with_path(shape, tree)


def placed_rows(tree: Any, mesh: Mesh) -> Any:
    """Return the shapes of a tree of rows as `place_rows` puts them on the devices."""
    return jax.tree.map(placed, tree, row_shardings(tree, mesh))


def local_bytes(tree: Any) -> int:
    """Return the bytes of placed arrays or shapes on one device; layouts of the devices may pad them."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_stats(device: jax.Device) -> Mapping[str, int]:
    """Return what a device of this process says of its memory, bytes by name.

    Nothing on CPUs, nor where each array is allocated by itself (XLA_PYTHON_CLIENT_ALLOCATOR=platform).
    """
    return device.memory_stats() or {}


def _row_dimension(path: tuple) -> int:
    return ROW_DIMENSION.get(getattr(path[-1], "name", ""), 0) if path else 0
