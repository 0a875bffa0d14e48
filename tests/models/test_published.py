"""Published sizes by shape alone: counts of the releases, and a weight map that covers every name once."""

from __future__ import annotations

import collections
import math

import pytest

from configs.published import SIZES, published_config
from configs.schema import ConfigError
from mllm4d_jax.models import weight_map
from mllm4d_jax.models.config import ModelConfig

# parameters, of which vision, tensors in the checkpoint
COUNTS = {
    "2b": (2127532032, 406957056, 625),
    "4b": (4437815808, 415347712, 713),
    "8b": (8767123696, 576388336, 750),
    "32b": (33357390064, 595266800, 1058),
    "30b_a3b": (31070754032, 538631408, 882),
    "235b_a22b": (235670022896, 576388336, 1388),
    "qwen2_5_vl_7b": (8292166656, 676550144, 729),
}


def test_all_sizes_are_listed():
    assert set(COUNTS) == set(SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_counts(size):
    config = ModelConfig.from_dict(published_config(size))
    parameters, vision, tensors = COUNTS[size]
    sizes = [(leaf.path[0], math.prod(leaf.shape)) for leaf in weight_map.leaves(weight_map.abstract_model(config))]
    assert sum(size for _, size in sizes) == parameters
    assert sum(size for part, size in sizes if part == "vision") == vision
    assert len(weight_map.published_tensors(config)) == tensors


@pytest.mark.parametrize("size", SIZES)
def test_every_name_is_used_once_and_shapes_add_up(size):
    config = ModelConfig.from_dict(published_config(size))
    leaves = weight_map.leaves(weight_map.abstract_model(config, attention="xla"))
    names = collections.Counter(name for leaf in leaves for name in leaf.names)
    assert set(names.values()) == {1}
    text, vision = config.text, config.vision
    shapes = weight_map.published_tensors(config)
    if config.family == "qwen3_vl":
        layer, tower = "model.language_model.layers.{}.", "model.visual."
        assert shapes[tower + "pos_embed.weight"] == (2304, vision.hidden_size)
        assert shapes[layer.format(0) + "self_attn.q_norm.weight"] == (128,)
        assert sum("deepstack_merger_list" in n for n in shapes) == 6 * 3
    else:
        layer, tower = "model.layers.{}.", "visual."
        assert shapes[layer.format(0) + "self_attn.q_proj.bias"] == (3584,)
    last = layer.format(text.num_layers - 1)
    assert shapes[last + "self_attn.q_proj.weight"] == (text.num_heads * text.head_dim, text.hidden_size)
    patch = (vision.hidden_size, 3, 2, vision.patch_size, vision.patch_size)
    assert shapes[tower + "patch_embed.proj.weight"] == patch
    assert layer.format(text.num_layers) + "self_attn.q_proj.weight" not in shapes
    if text.moe:
        e, h, i = text.moe.num_experts, text.hidden_size, text.moe.intermediate_size
        assert shapes[last + "mlp.experts.gate_up_proj"] == (e, h, 2 * i)
        assert shapes[last + "mlp.experts.down_proj"] == (e, i, h)


def test_unknown_size_lists_the_known():
    with pytest.raises(ConfigError, match="known: 2b"):
        published_config("3b")
