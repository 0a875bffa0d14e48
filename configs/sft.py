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
        "tiny": "a random tiny model learns a self-made sample world, on a CPU",
    }
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/sft.py")
    config = common.sft()
    if variant == "tiny":
        config.data.sample = "tiny"
        config.data.max_tokens = 512
        config.data.prefix_buckets = (64, 128, 192, 256, 384, 512)
        config.model.dtype = "float32"
        config.model.remat = "none"
        config.video.num_frames = 8
        config.video.max_pixels = 4096
        config.lora.rank = 16
        config.lora.alpha = 32.0
        config.optim.lr = 3e-3
        config.optim.warmup_ratio = 0.05
        config.train.batch_size = 4
        config.train.steps = 300
        config.train.log_every = 10
        config.train.checkpoint_every = 100
        config.train.loss_chunk = 256
    return config
