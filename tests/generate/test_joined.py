"""Joined products against the layers that they are made of, with biases and adapters on some of them."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.generate.joined import JoinedAttention, JoinedLinear, JoinedMLP
from mllm4d_jax.models import rope
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.text import DecoderBlock

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
    layers = [Linear(8, n, axes=(None, None), bias=b, dtype=dtype, rngs=rngs) for n, b in zip(widths, biases)]
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


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "o_proj", "up_proj", "down_proj"), ("k_proj", "v_proj", "gate_proj")])
def test_a_block_of_joined_layers_gives_the_same(name, targets):
    config = ModelConfig.from_file(GOLDEN / name / "config.json").text
    config = dataclasses.replace(config)
    block = DecoderBlock(config, False, dtype=jnp.float32, rngs=nnx.Rngs(1))
    for path, module in nnx.iter_modules(block):
        for which in ("kernel", "scale", "bias"):
            if hasattr(module, which) and getattr(module, which) is not None:
                value = getattr(module, which)
                key = jax.random.key(sum(map(ord, "/".join(map(str, path)) + which)))
                value.set_value(0.2 * jax.random.normal(key, value.shape))
        if path and path[-1] in targets:
            adapted(module, 3 + len(path[-1]) % 2, 0.7)
    x = jax.random.normal(jax.random.key(2), (2, 5, config.hidden_size))
    positions = jnp.broadcast_to(jnp.arange(5), (3, 2, 5))
    tables = rope.text_rope(config.rope, config.head_dim, positions, x.dtype)
    expected = *block.attn.project(x, *tables), block.mlp(x)
    joined, mlp = JoinedAttention(nnx.clone(block.attn), jnp.float32), JoinedMLP(block.mlp, jnp.float32)
    for a, b in zip((*joined.project(x, *tables), mlp(x)), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    heads = expected[0].reshape(2, 5, -1)
    np.testing.assert_allclose(joined.o_proj(heads), block.attn.o_proj(heads), atol=1e-5, rtol=1e-5)
