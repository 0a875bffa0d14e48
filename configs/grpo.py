"""Reinforcement learning with the spatio-temporal reward, from a cold-start adapter.

python run.py --config=configs/grpo.py:tiny
python run.py --config=configs/grpo.py --config.model.path=DIR --config.data.path=FILE.jsonl --config.data.root=DIR
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common, sft
from configs.schema import check_variant

VARIANTS = MappingProxyType(
    {
        "": "the paper's settings (arXiv 2603.00515): 12 completions a prompt, lr 5e-5, KL weight 0.1",
        "paper": "the same by name",
        "release": "the released training script's: lr 1e-4, KL weight 0.001, the release's reward",
        "tiny": "goes on from configs/cold_start.py:tiny (runs/cold_start-tiny), on a CPU",
    }
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/grpo.py")
    config = common.grpo()
    if variant == "release":
        config.optim.lr = 1e-4
        config.optim.warmup_ratio = 0.001
        config.objective.preset = "release"
        config.reward.functions = ("release::1.0",)
    if variant == "tiny":
        tiny(config)
    return config


def tiny(config: ml_collections.ConfigDict) -> None:
    """Turns a config into one that continues the tiny runs, in place."""
    config.model.path = "runs/sft-tiny/sample/model"
    config.model.adapter = "runs/cold_start-tiny"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.path = "runs/sft-tiny/sample/world/r1.jsonl"
    config.data.root = "runs/sft-tiny/sample/world"
    config.data.max_tokens = 512
    config.data.prefix_buckets = (128, 192, 256, 384, 512)
    config.prompt.system = sft.TINY_PROMPT
    config.video.num_frames = 8
    config.video.max_pixels = 4096
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.targets = sft.TINY_TARGETS
    config.optim.lr = 1e-4
    config.rollout.prompts = 8
    config.rollout.completions = 8
    config.rollout.temperature = 0.8  # so small a model is unsure of every token; at 1 it forgets what it has learned
    config.rollout.max_new_tokens = 256
    config.rollout.buckets = (64, 128, 192, 256)
    config.rollout.stop = ("</answer>",)
    config.objective.beta = 0.01
    config.eval.path = "runs/sft-tiny/sample/world/r1.jsonl"
    config.eval.every = 20
    config.eval.limit = 12
    config.train.steps = 40
    config.train.checkpoint_every = 20
    config.train.loss_chunk = 256
