"""A tiny random Qwen3-VL in a Hugging Face folder, so that the whole training path can be tried without a download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.data.samples import build_folder
from mllm4d_jax.encode.tokenizer import build_byte_level_tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import save_model
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.weight_map import abstract_model

VOCABULARY = 512
WIDTH = 128
# What a prompt holds besides the records' own text.
_SCAFFOLD = ("system\nuser\nassistant\n", *(f"<{t / 10:.1f} seconds>" for t in range(40)))


def tiny_config(special_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the tiny model, in the spelling of the released checkpoints.

    Args:
      special_ids: ids of the tokenizer's special tokens, by content.
    """
    text = dict(
        model_type="qwen3_vl_text",
        attention_bias=False,
        bos_token_id=special_ids["<|endoftext|>"],
        eos_token_id=special_ids["<|im_end|>"],
        head_dim=32,
        hidden_act="silu",
        hidden_size=WIDTH,
        intermediate_size=256,
        max_position_embeddings=4096,
        num_attention_heads=4,
        num_hidden_layers=3,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[6, 5, 5], rope_type="default"),
        rope_theta=5000000,
        vocab_size=VOCABULARY,
    )
    vision = dict(
        model_type="qwen3_vl",
        deepstack_visual_indexes=[0, 1],
        depth=3,
        hidden_act="gelu_pytorch_tanh",
        hidden_size=64,
        in_channels=3,
        intermediate_size=128,
        num_heads=2,
        num_position_embeddings=64,
        out_hidden_size=WIDTH,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    return dict(
        architectures=["Qwen3VLForConditionalGeneration"],
        model_type="qwen3_vl",
        image_token_id=special_ids["<|image_pad|>"],
        video_token_id=special_ids["<|video_pad|>"],
        vision_start_token_id=special_ids["<|vision_start|>"],
        vision_end_token_id=special_ids["<|vision_end|>"],
        tie_word_embeddings=False,
        torch_dtype="float32",
        text_config=text,
        vision_config=vision,
    )


def write_tiny_model(folder: str | Path, texts: Sequence[str], seed: int = 0) -> bool:
    """Writes config.json, tokenizer.json, the preprocessor files and model.safetensors.

    An existing complete folder made from the same arguments is kept.

    Args:
      folder: where to.
      texts: what the tokenizer's merges are learned from.
      seed: of the weights.

    Returns:
      True when it was written, False when it was there.

    Raises:
      SampleError: the folder has something else in it.
    """

    def write(target: Path) -> None:
        tokenizer = build_byte_level_tokenizer([*texts, *_SCAFFOLD], VOCABULARY)
        tokenizer.save(str(target / "tokenizer.json"))
        special_ids = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        config = tiny_config(special_ids)
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            (target / name).write_text(json.dumps(_preprocessor(), indent=1) + "\n")
        save_model(_random_model(ModelConfig.from_dict(config), seed), target)

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    spec = {"kind": "tiny model", "version": 1, "seed": seed, "texts": digest}
    return build_folder(Path(folder), spec, write)


def _preprocessor() -> dict[str, Any]:
    return dict(
        size=dict(shortest_edge=4096, longest_edge=65536),
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def _random_model(config: ModelConfig, seed: int) -> QwenVL:
    """A model with random weights: every matrix keeps activations of unit size, embedding tables have unit variance.

    At the usual 0.02 a model this narrow passes on almost nothing and adapters on attention have nothing to work with.
    Drawn with NumPy: compiling a random generator for each shape would take longer than everything else.
    """
    rng = np.random.default_rng(seed)
    model = abstract_model(config, dtype=jnp.float32, attention="xla", remat="none")
    graphdef, state = nnx.split(model)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        shape, kind = variable.get_value().shape, path[-1]
        if kind == "kernel":
            value = rng.normal(size=shape) * shape[-2] ** -0.5
        elif kind in ("embed", "pos_embed"):
            value = rng.normal(size=shape)
        else:
            value = np.ones(shape) if kind == "scale" else np.zeros(shape)
        filled.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
