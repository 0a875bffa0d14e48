"""The device mesh: axes `data`, `fsdp`, `tensor`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

AXES = ("data", "fsdp", "tensor")


class MeshError(ValueError):
    """The configured axes do not fit the devices."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh.

    On TPU, neighbours along an axis are neighbours on the chip network as far as the shape allows and every process
    keeps rows of its own; otherwise devices go process by process, so that `tensor`, the last axis, stays inside one.

    Args:
      sizes: devices along each of `data`, `fsdp`, `tensor`; missing axes are 1 and at most one is -1 ("what is left").
      devices: defaults to all devices of all processes.

    Raises:
      MeshError: unknown axis, size below 1, several -1, or a product that differs from the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(mesh_shape(sizes, len(devices)).values())
    if devices[0].platform == "tpu":
        mesh = Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
        if rows_divide(mesh):
            return mesh
    by_process = sorted(devices, key=lambda d: d.process_index)
    return Mesh(np.asarray(by_process).reshape(shape), AXES)


def mesh_shape(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Return the size of every axis for so many devices. Arguments and errors as for `make_mesh`."""
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise MeshError(f"unknown mesh axes {sorted(unknown)} (known: {', '.join(AXES)})")
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    free = [axis for axis, n in shape.items() if n == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in shape.values()):
        raise MeshError(f"mesh sizes {shape}: each at least 1, at most one -1")
    if free:
        rest = math.prod(n for n in shape.values() if n != -1)
        if devices % rest:
            raise MeshError(f"{devices} devices cannot be split by {rest} (mesh {dict(sizes)})")
        shape[free[0]] = devices // rest
    if math.prod(shape.values()) != devices:
        raise MeshError(f"mesh {shape} needs {math.prod(shape.values())} devices, found {devices}")
    return shape


def rows_divide(mesh: Mesh) -> bool:
    """Whether every process has its own part of a batch's rows (split over `data` and `fsdp`), all equally large.

    It does not when devices of several processes share the same rows, along `tensor`.
    """
    parts: dict[int, set[int]] = {}
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    for row, devices in enumerate(rows):
        for device in devices:
            parts.setdefault(device.process_index, set()).add(row)
    sizes = {len(part) for part in parts.values()}
    return len(sizes) == 1 and sum(len(part) for part in parts.values()) == len(rows)


def process_count(mesh: Mesh) -> int:
    """The number of processes that its devices belong to."""
    return len({device.process_index for device in mesh.devices.flat})


def own_part(mesh: Mesh) -> Mesh:
    """The rows of this process as a mesh of `data` and `tensor`; `mesh` itself where it is of one process.

    In a plan this process stands for the first one of the devices that are not here.

    Args:
      mesh: one whose rows divide, see `rows_divide`.
    """
    if process_count(mesh) == 1:
        return mesh
    rows = mesh.devices.reshape(-1, 1, mesh.shape["tensor"])
    mine = [row for row in rows if row[0, 0].process_index == jax.process_index()]
    return Mesh(np.asarray(mine), AXES)
