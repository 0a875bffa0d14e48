"""THE table that maps logical parameter axes to mesh axes.

Modules name the dimensions of their parameters (`logical_axes`); nothing else in the project decides where a weight
lives. A dimension that the mesh axis does not divide is replicated, so that small norms and odd widths need no rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. Embedding is split over its width and the head over the vocabulary: a head split over its
# width would be gathered whole for every logit.
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


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
