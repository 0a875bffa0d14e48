"""Adapters: no change at the start, the right product afterwards, and no copy of the frozen stack."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.models import layers
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.batch import ModelInputs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def text_inputs(case="text") -> ModelInputs:
    z = np.load(GOLDEN / "qwen3_vl" / f"{case}.npz")
    return ModelInputs(z["input_ids"], z["position_ids"], z["attention_mask"], np.full_like(z["input_ids"], -1), None)


def test_a_fresh_adapter_changes_nothing_and_has_its_parameters():
    model = load_model(GOLDEN / "qwen3_vl")
    before = model(text_inputs())
    attach_lora(model, rank=4, alpha=8.0, rngs=nnx.Rngs(0))
    # Adding exact zeros, but in another compiled program: sums may round differently.
    np.testing.assert_allclose(model(text_inputs()), before, atol=1e-5)
    h, q, kv, layers = 48, 128, 64, 4
    lora = nnx.state(model, nnx.LoRAParam)
    assert sum(x.size for x in jax.tree.leaves(lora)) == layers * 4 * ((h + q) + 2 * (h + kv) + (q + h))
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


def test_dropout_is_on_the_input_of_the_adapter_alone():
    layer = Linear(8, 8, axes=("embed", "heads"), bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    base = np.asarray(layer(x))
    layer.lora_a, layer.lora_b = nnx.LoRAParam(jnp.eye(8)), nnx.LoRAParam(jnp.eye(8))
    layer.lora_scale, layer.lora_dropout = 1.0, 0.25
    np.testing.assert_allclose(layer(x), base + x, atol=1e-6)  # no key: not in training
    seen = np.asarray(layer(x, jax.random.key(1))) - base
    dropped = np.isclose(seen, 0, atol=1e-6)
    np.testing.assert_allclose(seen[~dropped], (x / 0.75)[~dropped], atol=1e-5)
    assert abs(dropped.mean() - 0.25) < 0.02 and abs(dropped.mean(0) - 0.25).max() < 0.08
    other = np.asarray(layer(x, jax.random.key(2))) - base
    assert 0.3 < (np.isclose(other, 0, atol=1e-6) != dropped).mean() < 0.45  # 2 * 0.25 * 0.75


def test_every_layer_and_projection_drops_something_else(monkeypatch):
    model = load_model(GOLDEN / "qwen3_vl", dtype=jnp.float32)
    attach_lora(model, rank=2, alpha=2.0, targets=("q_proj", "k_proj", "o_proj", "down_proj"), dropout=0.5,
                rngs=nnx.Rngs(0))  # fmt: skip
    keys = []

    def dropout(x, rate, key):
        jax.debug.callback(lambda data: keys.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return x

    monkeypatch.setattr(layers, "dropout", dropout)
    for number in range(2):
        jax.block_until_ready(model(text_inputs(), dropout_key=jax.random.key(number)))
        jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 2 * 4 * 4
    model(text_inputs())
    jax.effects_barrier()
    assert len(keys) == 2 * 4 * 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(rank=4, targets=("q_proj", "qkv")), r"\['qkv'\] name no linear layer.*q_proj"),
        (dict(rank=0, targets=("q_proj",)), "rank must be at least 1"),
        (dict(rank=1, dropout=1.0), "dropout must be at least 0 and below 1"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attach_lora(load_model(GOLDEN / "qwen3_vl"), alpha=1.0, rngs=nnx.Rngs(0), **kwargs)
