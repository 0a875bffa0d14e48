"""Writes a checkpoint folder with random weights, in the names, shapes, dtype and files of a published model.

python tools/make_checkpoint.py --size=2b --out=DIR [--seed=0]

For trying out loading, memory and speed at a model's true size without downloading it; its answers mean nothing. One
shard (at most 1 GiB, or one tensor if that is larger) is held in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.published import SIZES, published_config
from mllm4d_jax.encode.tokenizer import QWEN_SPECIAL_IDS, build_byte_level_tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.weight_map import published_tensors

SHARD_BYTES = 1 << 30
STD = 0.02
BLOCK = 1 << 24  # float32 values drawn at a time
BF16 = np.dtype(ml_dtypes.bfloat16)
# What the merges of the tokenizer are learned from; enough for ordinary English to take few tokens a word.
SAMPLE = (
    "How far does the camera move between frame 3 and frame 26 of 31? Answer with the letter of the right option.",
    "Which way does the person in the red coat walk, seen from the camera? A. left B. right C. closer D. not moving",
    "The distance between the object and the camera grows from 1.2 metres to 3.4 metres, so the answer is B.",
    "system user assistant You are a helpful assistant. Describe this video. <0.3 seconds> <1.4 seconds>",
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make_checkpoint.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", required=True, choices=("tiny", *SIZES), help="which published model, or a tiny one")
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = parser.parse_args(argv[1:])
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out: '{out}' is not empty")
    config = tiny_config() if args.size == "tiny" else published_config(args.size)
    count = write_checkpoint(out, config, args.seed)
    print(f"wrote {count:,} parameters to {out}")
    return 0


def write_checkpoint(out: Path, config: Mapping[str, Any], seed: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes config, tokenizer, preprocessor files and weights; returns the number of parameters.

    Args:
      config: content of config.json.
      shard_bytes: a shard is closed before it would grow past this.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {"config.json": config, **preprocessor_files(config)}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = config.get("text_config", config)
    first_special = min(QWEN_SPECIAL_IDS.values())
    build_byte_level_tokenizer(SAMPLE, min(first_special, text["vocab_size"]), QWEN_SPECIAL_IDS).save(
        str(out / "tokenizer.json")
    )
    return write_weights(out, published_tensors(ModelConfig.from_dict(config)), seed, shard_bytes)


def write_weights(out: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, shard_bytes: int) -> int:
    """Writes bfloat16 tensors of these shapes as model.safetensors, or as shards with an index."""
    shards, filled = [[]], 0
    for name, shape in sorted(shapes.items()):
        size = math.prod(shape) * BF16.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: random_tensor(name, shapes[name], seed) for name in names}, out / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {len(names)} tensors", flush=True)
    count = sum(math.prod(shape) for shape in shapes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": count * BF16.itemsize}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return count


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """bfloat16 values of one tensor, the same for the same seed and name: 1 for norm weights, 0 for biases, else
    normal with standard deviation 0.02. Holds one float32 block beside the result."""
    if name.endswith(".bias"):
        return np.zeros(shape, BF16)
    module = name.removesuffix(".weight").rpartition(".")[2]
    if "norm" in module or module == "ln_q":
        return np.ones(shape, BF16)
    values = np.empty(math.prod(shape), BF16)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        block[:] = rng.standard_normal(block.size, np.float32) * np.float32(STD)
    return values.reshape(shape)


def tiny_config() -> dict[str, Any]:
    """config.json of a Qwen3-VL with every part of the published ones at a hundredth of the width."""
    config = published_config("2b")
    config["text_config"] |= dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    config["vision_config"] |= dict(
        depth=4,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        out_hidden_size=64,
        deepstack_visual_indexes=[0, 1, 2],
    )
    return config


def preprocessor_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> content, as the published repositories have them."""
    vision = config["vision_config"]
    common = dict(
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
    )
    if config["model_type"] == "qwen2_5_vl":
        common |= dict(
            min_pixels=3136,
            max_pixels=12845056,
            image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711],
            image_processor_type="Qwen2VLImageProcessor",
            processor_class="Qwen2_5_VLProcessor",
        )
        return {"preprocessor_config.json": common}
    common |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, processor_class="Qwen3VLProcessor")
    image = common | dict(
        size=dict(shortest_edge=65536, longest_edge=16777216), image_processor_type="Qwen2VLImageProcessorFast"
    )
    video = common | dict(
        size=dict(shortest_edge=4096, longest_edge=25165824), video_processor_type="Qwen3VLVideoProcessor"
    )
    return {"preprocessor_config.json": image, "video_preprocessor_config.json": video}


if __name__ == "__main__":
    sys.exit(main(sys.argv))
