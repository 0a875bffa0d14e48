"""What the tiny runs of the three stages have in common: a random model and short clips, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Stands in for the reasoning prompt, which is long for a vocabulary this small.
PROMPT = "Reply as <thinking>reasoning</thinking><answer>letter</answer>."
TINY: Mapping[str, Any] = MappingProxyType(
    {
        "data.max_tokens": 512,
        "model.dtype": "float32",
        "model.remat": "none",
        "video.num_frames": 8,
        "video.max_pixels": 4096,
        "lora.rank": 16,
        "lora.alpha": 32.0,
        "lora.targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # random base
        "train.loss_chunk": 256,
    }
)
# Fine-tuning and cold start.
TINY_SFT: Mapping[str, Any] = MappingProxyType(
    {
        **TINY,
        "data.prefix_buckets": (64, 128, 192, 256, 384, 512),
        "optim.lr": 3e-3,
        "train.steps": 300,
        "train.checkpoint_every": 100,
    }
)
