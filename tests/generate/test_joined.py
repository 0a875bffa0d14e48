"""Joined products against the layers that they are made of, with biases and adapters on some of them."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.generate import kernels
from mllm4d_jax.generate.decoding import Asked, branch_attention
from mllm4d_jax.generate.joined import JoinedAttention, JoinedLinear, JoinedMLP
from mllm4d_jax.models import rope
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.text import DecoderBlock, KVCache

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def adapted(linear, rank, scale):
    """`linear` with a random adapter of that rank."""
    d_in, d_out = linear.kernel.shape
    normal = np.random.default_rng(rank).normal
    linear.lora_a = nnx.LoRAParam(jnp.asarray(normal(size=(d_in, rank)) / d_in**0.5, jnp.float32))
    linear.lora_b = nnx.LoRAParam(jnp.asarray(normal(size=(rank, d_out)), jnp.float32))
    linear.lora_scale = scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 0, 5), (0, 2, 0)])
def test_one_product_for_several(ranks, dtype):
    rngs, widths, biases = nnx.Rngs(0), (6, 4, 2), (True, False, True)
    layers = [
        Linear(8, n, axes=(None, None), bias=b, dtype=dtype, rngs=rngs) for n, b in zip(widths, biases, strict=True)
    ]
    for n, (layer, rank) in enumerate(zip(layers, ranks, strict=True)):
        layer.kernel.set_value((jax.random.normal(jax.random.key(n), layer.kernel.shape)).astype(dtype))
        if layer.bias is not None:
            layer.bias.set_value(jnp.arange(1, layer.bias.shape[0] + 1).astype(dtype))
        if rank:
            adapted(layer, rank, 0.5 + n)
    x = jax.random.normal(jax.random.key(7), (3, 5, 8)).astype(dtype)
    found, parts = JoinedLinear(layers, dtype)(x), []
    for layer in layers:
        y = np.asarray(x, np.float64) @ np.asarray(layer.kernel[...], np.float64)
        if layer.bias is not None:
            y += np.asarray(layer.bias[...], np.float64)
        if layer.lora_a is not None:
            low = np.asarray(x, np.float64) @ np.asarray(layer.lora_a[...], np.float64)
            y += layer.lora_scale * low @ np.asarray(layer.lora_b[...], np.float64)
        parts.append(y)
    expected = np.concatenate(parts, -1)
    # bfloat16 has 8 bits; several roundings, of the result and of what it is made of.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2e-5 if dtype == jnp.float32 else 0.25)
    each = jnp.concatenate([layer(x) for layer in layers], -1)
    if dtype == jnp.bfloat16:
        np.testing.assert_allclose(found.astype(jnp.float32), each.astype(jnp.float32), rtol=2**-7, atol=2**-6)


def block_of(name, targets):
    """(config, a block of random weights with adapters on some of its layers)."""
    config = ModelConfig.from_folder(GOLDEN / name).text
    block = DecoderBlock(config, False, dtype=jnp.float32, rngs=nnx.Rngs(1))
    for n, (_, node) in enumerate(nnx.iter_graph(block)):
        if isinstance(node, nnx.Param):
            node.set_value(0.2 * jax.random.normal(jax.random.key(n), node.get_value().shape))
    for path, module in nnx.iter_modules(block):
        if path and path[-1] in targets:
            adapted(module, 3 + len(path[-1]) % 2, 0.7)
    return config, block


@pytest.mark.parametrize(
    ("name", "targets"),
    [("qwen3_vl", ("q_proj", "o_proj", "up_proj", "down_proj")), ("qwen2_5_vl", ("k_proj", "v_proj", "gate_proj"))],
)
def test_a_block_of_joined_layers_gives_the_same(name, targets):
    config, block = block_of(name, targets)
    x = jax.random.normal(jax.random.key(2), (2, 5, config.hidden_size))
    positions = jnp.broadcast_to(jnp.arange(5), (3, 2, 5))
    tables = rope.text_rope(config.rope, config.head_dim, positions, x.dtype)
    expected = *block.attn.project(x, *tables), block.mlp(x)
    joined, mlp = JoinedAttention(nnx.clone(block.attn), jnp.float32), JoinedMLP(block.mlp, jnp.float32)
    for a, b in zip((*joined.project(x, *tables), mlp(x)), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    heads = expected[0].reshape(2, 5, -1)
    np.testing.assert_allclose(joined.o_proj(heads), block.attn.o_proj(heads), atol=1e-5, rtol=1e-5)


def caches(rng, *shape):
    return KVCache(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))


# Rows that fill no block, keys of the prompt in two, own ones in two parts and of a branch that began with tokens.
@pytest.mark.parametrize(
    ("sizes", "began"), [((1, 20, 4, 1, 130, 7, 32, 5), False), ((2, 2, 2, 2, 140, 520, 16, 515), True)]
)
def test_attention_by_kernels_equals_that_of_xla(sizes, began, monkeypatch):
    monkeypatch.setattr(kernels, "_PARTS", 1 if began else 16)  # a long prompt: two steps of a program
    b, g, n, k, p, t, d, slot = sizes
    rng = np.random.default_rng(3)
    q, prompt, own = caches(rng, b, g, k * n, d).k, caches(rng, b, k, p, d), caches(rng, b, k, g, t, d)
    visible = jnp.asarray(rng.random((b, p)) < 0.6)
    asked = Asked(*(jnp.asarray(x, jnp.int32) for x in (rng.integers(0, 5, (b, g)), np.full((b, g), 5 * began))))
    slots = jnp.asarray(rng.integers(5 * began, slot + 1, (b, g)).tolist(), jnp.int32).at[0, 0].set(slot)
    expected = branch_attention(q, prompt, visible, own, slots, asked if began else None)
    found = kernels.attend(q.reshape(b, g, k, n, d).swapaxes(1, 2), prompt, visible, own, slots, asked)
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=2e-6)


@pytest.mark.parametrize(("name", "targets"), [("qwen3_vl", ("q_proj", "v_proj", "o_proj")), ("qwen2_5_vl", ())])
def test_a_step_by_kernels_equals_that_of_the_block(name, targets):
    config, block = block_of(name, targets)
    rng, b, g, slots = np.random.default_rng(4), 2, 3, jnp.array([[2, 0, 3], [1, 2, 2]])
    x = jnp.asarray(rng.normal(size=(b, g, config.hidden_size)), jnp.float32)
    tables = rope.text_rope(config.rope, config.head_dim, jnp.full((3, b, g), 7), x.dtype)
    prompt = caches(rng, b, config.num_kv_heads, 9, config.head_dim)
    own = caches(rng, b, config.num_kv_heads, g, 4, config.head_dim)
    visible, asked = jnp.ones((b, 9), bool), Asked(*[jnp.zeros((b, g), jnp.int32)] * 2)
    normed = block.input_norm(x)
    q, *new = block.attn.project(normed, *tables)
    written = [np.array(cache) for cache in own]
    for row, branch in np.ndindex(b, g):
        for cache, arrived in zip(written, new, strict=True):
            cache[row, :, branch, slots[row, branch]] = arrived[row, branch]
    out = branch_attention(q, prompt, visible, KVCache(*map(jnp.asarray, written)), slots)
    expected = x + block.attn.o_proj(out.reshape(b, g, -1))
    joined = JoinedAttention(block.attn, jnp.float32, kernels=True)
    joined.kernels = True  # of 16 or 32 entries a head
    found, cache = joined.step(x, normed, tables, prompt, own, visible, slots, asked)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    for a, c in zip(cache, written, strict=True):
        np.testing.assert_allclose(a, c, atol=1e-5, rtol=1e-5)


def test_kernels_are_lowered_for_a_gpu(monkeypatch):
    """As far as their intermediate language: what the interpreter takes and Triton does not is found without a GPU."""
    monkeypatch.setattr(kernels, "_interpreted", lambda: False)
    b, g, n, k, p, t, d, ranks = 2, 3, 4, 2, 40, 64, 32, 16

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def attend(q, prompt, visible, own, slots):
        return kernels.attend(q, KVCache(*prompt), visible, KVCache(*own), slots, (slots, slots))

    def place(y, up, scale, norm, tables, own, slots):
        return kernels.place(y, up, scale, None, norm, 1e-6, tables, KVCache(*own), slots)

    width, slots, own = (n + 2) * k * d, array(b, g, dtype=jnp.int32), (array(b, k, g, t, d),) * 2
    prompt = (array(b, k, p, d),) * 2
    adapters = array(ranks, width), array(width)
    calls = (
        (attend, array(b, k, g, n, d), prompt, array(b, p, dtype=bool), own, slots),
        (place, array(b, g, width + ranks), *adapters, array((n + 1) * k, d), (array(b, g, d),) * 2, own, slots),
    )
    for function, *shapes in calls:
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert "triton" in text
