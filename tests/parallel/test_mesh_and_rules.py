"""Mesh shapes and the table of placements."""

from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec

from configs.published import SIZES, published_config
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.weight_map import abstract_model, leaves
from mllm4d_jax.parallel.mesh import MeshError, make_mesh
from mllm4d_jax.parallel.rules import batch_sharding, partition_spec


def test_minus_one_takes_what_is_left():
    assert dict(make_mesh({"data": -1, "tensor": 2}).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert dict(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "needs 3 devices, found 8"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": -1, "fsdp": 3}, "8 devices cannot be split by 3"),
        ({"fsdp": 0}, "at least 1"),
        ({"model": 2}, r"unknown mesh axes \['model'\]"),
    ],
)
def test_bad_meshes(sizes, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(sizes)


def test_specs_follow_the_table_and_odd_sizes_are_replicated():
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    assert partition_spec(("layers", "embed", "heads"), (3, 8, 8), mesh) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(("embed", "vocab"), (6, 8), mesh) == PartitionSpec(None, "tensor")
    assert partition_spec((None,), (8,), mesh) == PartitionSpec(None)
    with pytest.raises(ValueError, match="'width' has no rule"):
        partition_spec(("width",), (8,), mesh)
    with pytest.raises(ValueError, match="2 logical axes"):
        partition_spec(("embed", "heads"), (8,), mesh)
    assert batch_sharding(mesh, 3, 1).spec == PartitionSpec(None, ("data", "fsdp"), None)


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_of_every_published_size_has_a_placement(size):
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    table = leaves(abstract_model(ModelConfig.from_dict(published_config(size)), attention="xla"))
    specs = {leaf.path: partition_spec(leaf.axes, leaf.shape, mesh) for leaf in table}
    large = [leaf for leaf in table if len(leaf.shape) >= 2 and leaf.path[-1] == "kernel"]
    assert large and all(any(specs[leaf.path]) for leaf in large)
