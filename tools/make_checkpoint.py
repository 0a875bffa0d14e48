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

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.published import SIZES, published_config
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import QWEN_SPECIAL_IDS, build_byte_level_tokenizer
from mllm4d_jax.files.storage import StorageError, storing
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import write_shards
from mllm4d_jax.models.weight_map import published_tensors
from mllm4d_jax.run import tiny

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
    try:
        with storing(out):
            if out.exists() and any(out.iterdir()):
                parser.error(f"--out: '{out}' is not empty")
            out.mkdir(parents=True, exist_ok=True)
    except StorageError as problem:
        parser.error(f"--out: {problem}")
    config = tiny_config() if args.size == "tiny" else published_config(args.size)
    count = write_checkpoint(out, config, args.seed)
    print(f"wrote {count:,} parameters to {out}")
    return 0


def write_checkpoint(out: Path, config: Mapping[str, Any], seed: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Write config, tokenizer, preprocessor files and weights; return the number of parameters.

    Args:
      config: content of config.json.
      shard_bytes: a shard is closed before it would grow past this.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_settings(out, config)
    text = config.get("text_config", config)
    first_special = min(QWEN_SPECIAL_IDS.values())
    tokenizer = build_byte_level_tokenizer(SAMPLE, min(first_special, text["vocab_size"]), QWEN_SPECIAL_IDS)
    tokenizer.save(str(out / "tokenizer.json"))
    return write_weights(out, published_tensors(ModelConfig.from_dict(config)), seed, shard_bytes)


def write_settings(out: Path, config: Mapping[str, Any]) -> None:
    """Write config.json and the preprocessor files, with the published numbers of the model's family."""

    def write(name: str, content: Mapping[str, Any]) -> None:
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    write("config.json", config)
    numbers = ProcessorConfig.from_folder(out)
    common = dict(
        patch_size=numbers.patch_size,
        temporal_patch_size=numbers.temporal_patch_size,
        merge_size=numbers.merge_size,
        image_mean=numbers.image_mean,
        image_std=numbers.image_std,
    )
    if numbers.family == "qwen2_5_vl":
        common |= dict(processor_class="Qwen2_5_VLProcessor", image_processor_type="Qwen2VLImageProcessor")
        common |= dict(min_pixels=numbers.image_min_pixels, max_pixels=numbers.image_max_pixels)
        write("preprocessor_config.json", common)
        return
    common |= dict(processor_class="Qwen3VLProcessor")
    image = dict(shortest_edge=numbers.image_min_pixels, longest_edge=numbers.image_max_pixels)
    video = dict(shortest_edge=numbers.video_min_pixels, longest_edge=numbers.video_max_pixels)
    write("preprocessor_config.json", common | dict(image_processor_type="Qwen2VLImageProcessorFast", size=image))
    write("video_preprocessor_config.json", common | dict(video_processor_type="Qwen3VLVideoProcessor", size=video))


def write_weights(out: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, shard_bytes: int) -> int:
    """Write random bfloat16 tensors of these shapes; return the number of parameters."""
    sizes = {name: math.prod(shape) * BF16.itemsize for name, shape in shapes.items()}
    write_shards(out, sizes, lambda name: random_tensor(name, shapes[name], seed), shard_bytes)
    return sum(sizes.values()) // BF16.itemsize


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return bfloat16 values of one tensor, the same for the same seed and name: 1 for norm weights, 0 for biases, else
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
    """Return config.json of the tiny model of `mllm4d_jax.run.tiny` with the vocabulary of the published ones."""
    config = tiny.tiny_config(dict(QWEN_SPECIAL_IDS)) | dict(torch_dtype="bfloat16", tie_word_embeddings=True)
    config["text_config"]["vocab_size"] = published_config("2b")["text_config"]["vocab_size"]
    return config


if __name__ == "__main__":
    sys.exit(main(sys.argv))
