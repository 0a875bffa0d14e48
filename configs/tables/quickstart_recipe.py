"""How the quickstart trains: settings of its fine-tuning, cold start and reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from configs.tables.tiny import TINY, TINY_SFT

SFT: Mapping[str, Any] = MappingProxyType(
    {**TINY_SFT, "data.max_tokens": 2048, "data.questions_per_video": 8, "train.batch_size": 32}
)
COLD_START: Mapping[str, Any] = MappingProxyType({**SFT, "train.steps": 100})
GRPO: Mapping[str, Any] = MappingProxyType(
    {
        **TINY,
        "data.max_tokens": 2048,
        "data.prefix_buckets": TINY_SFT["data.prefix_buckets"],
        "optim.lr": 1e-4,
        "rollout.prompts": 8,
        "rollout.completions": 8,
        "rollout.max_new_tokens": 256,
        "rollout.stop": ("</answer>",),
        "train.steps": 40,
        "train.checkpoint_every": 20,
    }
)
