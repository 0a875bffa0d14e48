"""Supervised fine-tuning with LoRA: the paper's Qwen3-VL-8B run, or a tiny run that needs nothing but this repository.

python run.py --config=configs/sft.py:tiny
python run.py --config=configs/sft.py --config.model.path=DIR --config.data.path=FILE.json --config.data.root=DIR
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common
from configs.schema import check_variant

VARIANTS = MappingProxyType(
    {
        "": "the paper's settings (arXiv 2603.00515): Qwen3-VL-8B, LoRA rank 128 on q,k,v,o, batch 8, 30,000 steps",
        "release": "the released training script's: batch 64, at most 8 frames, adapter dropout 0.05",
        "qwen2_5_vl_7b": "the paper's other base, Qwen2.5-VL-7B",
        "qwen3_vl_2b": "the paper's settings on Qwen3-VL-2B",
        "qwen3_vl_4b": "on Qwen3-VL-4B",
        "qwen3_vl_32b": "on Qwen3-VL-32B, parameters sharded over 8 devices",
        "qwen3_vl_30b_a3b": "on Qwen3-VL-30B-A3B (mixture of experts), parameters sharded over 8 devices",
        "tiny": "a random tiny model learns a self-made sample world, on a CPU",
    }
)

# The tiny runs' stand-in for the reasoning prompt, which is long for a vocabulary this small.
TINY_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # its base is random
TINY_PROMPT = "Reply as <thinking>reasoning</thinking><answer>letter</answer>."

# variant -> (size as `model.published` names it, devices that share the parameters)
_BASES = MappingProxyType(
    {
        "qwen2_5_vl_7b": ("qwen2_5_vl_7b", 1),
        "qwen3_vl_2b": ("2b", 1),
        "qwen3_vl_4b": ("4b", 1),
        "qwen3_vl_32b": ("32b", 8),
        "qwen3_vl_30b_a3b": ("30b_a3b", 8),
    }
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/sft.py")
    config = common.sft()
    if variant in _BASES:
        config.model.published, config.mesh.fsdp = _BASES[variant]
    if variant == "release":
        config.video.num_frames = 8
        config.lora.dropout = 0.05
        config.train.batch_size = 64  # 8 on each of 8 GPUs
        config.train.steps = 31250  # one epoch of two million records
    if variant == "tiny":
        tiny(config)
    return config


def tiny(config: ml_collections.ConfigDict) -> None:
    """Turns a config into one of the tiny sample model, in place."""
    config.data.sample = "tiny"
    config.data.max_tokens = 512
    config.data.prefix_buckets = (64, 128, 192, 256, 384, 512)
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.video.num_frames = 8
    config.video.max_pixels = 4096
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.targets = TINY_TARGETS
    config.optim.lr = 3e-3
    config.optim.warmup_ratio = 0.05
    config.train.batch_size = 4
    config.train.steps = 300
    config.train.log_every = 10
    config.train.checkpoint_every = 100
    config.train.loss_chunk = 256
