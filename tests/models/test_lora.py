"""Adapters: no change at the start, the right product afterwards, and no copy of the frozen stack."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.lora import attach_lora
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.processing.batch import ModelInputs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def text_inputs(case="text") -> ModelInputs:
    z = np.load(GOLDEN / "qwen3_vl" / f"{case}.npz")
    return ModelInputs(z["input_ids"], z["position_ids"], z["attention_mask"], np.full_like(z["input_ids"], -1), None)


def test_a_fresh_adapter_changes_nothing_and_counts_its_parameters():
    model = load_model(GOLDEN / "qwen3_vl")
    before = model(text_inputs())
    added = attach_lora(model, rank=4, alpha=8.0, rngs=nnx.Rngs(0))
    # Adding exact zeros, but in another compiled program: sums may round differently.
    np.testing.assert_allclose(model(text_inputs()), before, atol=1e-5)
    h, q, kv, layers = 48, 128, 64, 4
    assert added == layers * 4 * ((h + q) + 2 * (h + kv) + (q + h))
    lora = nnx.state(model, nnx.LoRAParam)
    assert sum(x.size for x in jax.tree.leaves(lora)) == added
    assert {x.dtype for x in jax.tree.leaves(lora)} == {jnp.dtype(jnp.float32)}


def test_adapter_equals_the_merged_weight():
    model = load_model(GOLDEN / "qwen3_vl", dtype=jnp.float32)
    attach_lora(model, rank=3, alpha=6.0, targets=("q_proj", "down_proj"), rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    merged = load_model(GOLDEN / "qwen3_vl", dtype=jnp.float32)
    ours = dict(nnx.iter_modules(model.text))
    for path, module in nnx.iter_modules(merged.text):
        adapted = ours[path]
        if isinstance(module, Linear) and adapted.lora_b is not None:
            adapted.lora_b[...] = jnp.asarray(rng.normal(size=adapted.lora_b.shape) * 0.1, jnp.float32)
            product = np.einsum("lir,lro->lio", adapted.lora_a[...], adapted.lora_b[...], dtype=np.float64)
            module.kernel[...] = jnp.asarray(np.asarray(module.kernel[...]) + 2.0 * product, jnp.float32)
    with jax.default_matmul_precision("highest"):
        a, b = model(text_inputs()), merged(text_inputs())
    plain = load_model(GOLDEN / "qwen3_vl", dtype=jnp.float32)(text_inputs())
    np.testing.assert_allclose(a, b, atol=5e-5)
    assert np.abs(np.asarray(a) - np.asarray(plain)).max() > 1e-2


def test_split_separates_adapters_from_the_frozen_rest():
    model = load_model(GOLDEN / "qwen3_vl_moe")
    attach_lora(model, rank=2, alpha=2.0, rngs=nnx.Rngs(0))
    _, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    names = {path[-1] for path, _ in nnx.to_flat_state(lora)}
    assert names == {"lora_a", "lora_b"}
    assert not any(path[-1].startswith("lora_") for path, _ in nnx.to_flat_state(rest))
    assert not any(path[0] == "vision" for path, _ in nnx.to_flat_state(lora))


def test_scanned_adapter_costs_only_its_own_bytes():
    """Gradients of a stacked adapter must not make XLA copy the stacked base weights."""
    model = load_model(GOLDEN / "qwen3_vl", dtype=jnp.float32)
    attach_lora(model, rank=2, alpha=2.0, rngs=nnx.Rngs(0))
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(lora, rest, inputs):
        return jnp.sum(nnx.merge(graphdef, lora, rest)(inputs) ** 2)

    inputs = jax.tree.map(lambda a: jnp.asarray(a)[..., :2], text_inputs())  # so few that weights dominate
    compiled = jax.jit(jax.grad(loss)).lower(lora, rest, inputs).compile()
    stacked = sum(x.size * 4 for x in jax.tree.leaves(nnx.state(model.text.stacks, nnx.Param)))
    assert compiled.memory_analysis().temp_size_in_bytes < stacked / 2


def test_adapters_are_placed_like_the_weights():
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    model = load_model(GOLDEN / "qwen3_vl", mesh=mesh)
    attach_lora(model, rank=4, alpha=8.0, rngs=nnx.Rngs(0), mesh=mesh)
    q_proj = model.text.stacks[0].attn.q_proj
    a, b = q_proj.lora_a[...], q_proj.lora_b[...]
    assert a.sharding.shard_shape(a.shape) == (4, 24, 4)
    assert b.sharding.shard_shape(b.shape) == (4, 4, 64)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(rank=4, targets=("q_proj", "qkv")), r"\['qkv'\] name no linear layer.*q_proj"),
        (dict(rank=0, targets=("q_proj",)), "rank must be at least 1"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attach_lora(load_model(GOLDEN / "qwen3_vl"), alpha=1.0, rngs=nnx.Rngs(0), **kwargs)
