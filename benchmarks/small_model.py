"""The small random Qwen3-VL of the benchmarks on CPUs, as a Hugging Face folder, and the size of its clips on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from configs.published import published_config
from mllm4d_jax.encode.tokenizer import build_byte_level_tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.weight_map import published_tensors
from tools import make_checkpoint

VOCABULARY = 4096
STORED = (512, 512)  # height and width of the clips on disk
SEED = 0


class ModelSize(NamedTuple):
    """Widths and depths of the model; the defaults keep the 2B model's balance between tower, decoder and head."""

    layers: int = 6
    width: int = 512
    vision_layers: int = 6
    vision_width: int = 256


def write_model(folder: Path, shape: ModelSize, texts: Sequence[str]) -> int:
    """Writes a random Qwen3-VL of this shape as a Hugging Face folder; returns its parameters."""
    folder.mkdir(parents=True)
    stamps = [f"<{t / 10:.1f} seconds>" for t in range(80)]
    tokenizer = build_byte_level_tokenizer([*texts, *stamps, "system\nuser\nassistant\n"], VOCABULARY)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}
    config = published_config("2b")
    config |= dict(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    config["text_config"] |= dict(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=max(1, shape.width // 128),
        head_dim=64,
        intermediate_size=3 * shape.width,
        vocab_size=VOCABULARY,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
    )
    config["text_config"]["rope_scaling"]["mrope_section"] = [12, 10, 10]
    config["vision_config"] |= dict(
        depth=shape.vision_layers,
        hidden_size=shape.vision_width,
        num_heads=shape.vision_width // 64,
        intermediate_size=4 * shape.vision_width,
        out_hidden_size=shape.width,
        deepstack_visual_indexes=sorted({k * shape.vision_layers // 4 for k in (1, 2, 3)}),
    )
    make_checkpoint.write_settings(folder, config)
    shapes = published_tensors(ModelConfig.from_dict(config))
    return make_checkpoint.write_weights(folder, shapes, SEED, make_checkpoint.SHARD_BYTES)
