"""The quickstart: its own keys, and the settings of the tasks that it starts, as variants of their config files."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from configs.schema import Key
from configs.tables import quickstart_recipe as recipe
from configs.tables.shared import run_keys

BASE = "mllm4d_jax/quickstart/base"  # of configs/pretrain_tiny.py at commit 71c2037

QUICKSTART_KEYS = (
    *run_keys("quickstart"),
    Key(
        "size",
        "laptop",
        "how much is made and learned; 'smoke' only shows that everything runs",
        choices=("laptop", "accelerator", "smoke"),
    ),
    Key("base", BASE, "Hugging Face folder of the model to start from (configs/pretrain_tiny.py)", content=True),
    Key("workers", 0, "processes that make clips and questions; 0 = one for every core", low=0, high=1024, free=True),
)

_WORLDS: Mapping[str, Any] = MappingProxyType(
    {**recipe.WORLDS, **recipe.QUESTIONS, "synthetic.height": 192, "synthetic.width": 192, "report.clips": 4}
)
# Worlds to learn from, seen by two eyes. Their exact questions are written too, for those who want to compare.
WORLDS: Mapping[str, Any] = MappingProxyType(
    {**_WORLDS, "synthetic.clips": 400, "synthetic.stereo": True, "synthetic.baseline": 0.2, "bench_share": 0.0}
)
# So much greater is the seed of the worlds for reinforcement.
NEW_SEED = 500
# Worlds to be examined on, with exact truth: about 115 questions of each subtask, all classes equally often. No
# training seed may be this one, nor that of the base's pre-training.
BENCH: Mapping[str, Any] = MappingProxyType(
    {
        **_WORLDS,
        "seed": 9000,
        "synthetic.clips": 500,
        "synthetic.height": 96,
        "synthetic.width": 96,
        "bench_share": 1.0,
        "questions.draws": 2,
    }
)
QUESTIONS: Mapping[str, Any] = MappingProxyType(
    {
        **recipe.QUESTIONS,
        "source": "stereo",
        "forms": ("mirrored", "backwards", "mirrored_backwards"),
        "bench_share": 0.0,
        "report.clips": 4,
    }
)
REASONING: Mapping[str, Any] = MappingProxyType(
    {
        "source": "cold_start",
        "cold_start.total": 0,
        "cold_start.style": "brief",
        "cold_start.paths": 1,
        "cold_start.filter": "no_filter",
    }
)
WITH_ST = {"accuracy": 0.5, "format": 0.2, "camera": 0.15, "object": 0.15}  # the paper's shares
WITHOUT_ST = {**WITH_ST, "camera": 0.0, "object": 0.0}  # measured all the same


def _spelled(shares: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(f"{name}::{share}" for name, share in shares.items())


_GRPO = {**recipe.GRPO, "prompt.system": ""}  # it is in a file
GRPO_WITH_ST: Mapping[str, Any] = MappingProxyType({**_GRPO, "reward.functions": _spelled(WITH_ST)})
GRPO_WITHOUT_ST: Mapping[str, Any] = MappingProxyType({**_GRPO, "reward.functions": _spelled(WITHOUT_ST)})
# How the model sees clips is the same in training and evaluation.
_SEEN = {name: value for name, value in recipe.SFT.items() if name.startswith("video.") or name == "model.dtype"}
EVAL: Mapping[str, Any] = MappingProxyType(
    {
        **_SEEN,
        "benchmark": "mllm4d",
        "data.prefix_buckets": recipe.SFT["data.prefix_buckets"],
        "data.max_tokens": recipe.SFT["data.max_tokens"],
        "questions_per_video": 20,
        "prompts_at_once": 16,
        "max_new_tokens": 48,  # an answer with both spatial states
    }
)
EVAL_REASONING: Mapping[str, Any] = MappingProxyType(
    {**EVAL, "prompt.mode": "file", "max_new_tokens": recipe.GRPO["rollout.max_new_tokens"]}
)

# How many times as wide a copy of the base model is trained, where it is not the base itself.
WIDER: Mapping[str, int] = MappingProxyType({"accelerator": 2, "smoke": 2})
# Size -> stages that are done at the same time. An examination keeps one core busy for half of its time; on machines
# with more of them it is done beside training, which leaves a GPU idle for most of the time. One that comes late finds
# its programs compiled by those that came early; eight at once would all compile them. Those of the base, of adapters
# and of adapters that reason differ.
TOGETHER: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        "laptop": (
            ("eval_base", "eval_sft", "eval_cold_start"),
            ("eval_base_forced", "eval_sft_shuffled", "eval_control"),
            ("eval_grpo_without_st", "eval_grpo"),
        ),
        "accelerator": (
            ("worlds", "worlds_rl", "wider"),
            ("questions", "questions_rl", "bench"),
            ("sft", "reasoning", "reasoning_rl", "eval_base", "eval_base_forced"),
            ("cold_start", "eval_sft", "eval_sft_shuffled"),
            ("grpo_without_st", "grpo", "eval_cold_start"),
            ("control", "eval_grpo_without_st", "eval_grpo"),
        ),
    }
)
# Size -> where its times were measured.
MACHINES: Mapping[str, str] = MappingProxyType(
    {"laptop": "two quiet cores", "accelerator": "one NVIDIA H200 with 16 cores", "smoke": "two quiet cores"}
)
_LAPTOP_SECONDS = {
    "worlds": 32,
    "questions": 82,
    "worlds_rl": 12,
    "questions_rl": 23,
    "bench": 14,
    "sft": 167,
    "reasoning": 7,
    "reasoning_rl": 3,
    "cold_start": 44,
    "grpo_without_st": 84,
    "grpo": 72,
    "control": 62,
    "eval_base": 77,
    "eval_base_forced": 55,
    "eval_sft": 79,
    "eval_sft_shuffled": 55,
    "eval_cold_start": 79,
    "eval_control": 55,
    "eval_grpo_without_st": 24,
    "eval_grpo": 24,
}
_ACCELERATOR_SECONDS = {
    "worlds": 47,
    "questions": 86,
    "worlds_rl": 34,
    "questions_rl": 48,
    "wider": 53,
    "bench": 32,
    "sft": 105,
    "reasoning": 19,
    "reasoning_rl": 10,
    "cold_start": 43,
    "grpo_without_st": 73,
    "grpo": 72,
    "control": 36,
    "eval_base": 76,
    "eval_base_forced": 77,
    "eval_sft": 69,
    "eval_sft_shuffled": 65,
    "eval_cold_start": 52,
    "eval_control": 27,
    "eval_grpo_without_st": 28,
    "eval_grpo": 29,
}
# Size -> stage -> seconds that it takes on that machine, beside its group; corrected by what is measured while it runs.
SECONDS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "laptop": _LAPTOP_SECONDS,
        "accelerator": _ACCELERATOR_SECONDS,
        "smoke": dict.fromkeys(_ACCELERATOR_SECONDS, 12.0),
    }
)
_LOADED = {"data.workers": 4, "train.log_every": 50, "train.checkpoint_every": 1000}  # the loader is what takes time
_FEW_WORLDS = {"synthetic.clips": 6, "synthetic.frames": 4, "synthetic.height": 128, "synthetic.width": 128}
_FEW = {"train.steps": 2, "train.batch_size": 2, "data.questions_per_video": 2, "data.rows": 1}
_FEW_SAMPLES = {"train.steps": 2, "rollout.prompts": 1, "rollout.completions": 2, "rollout.max_new_tokens": 8}
# What the other sizes change, by stage.
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "laptop": {"worlds_rl": {"synthetic.clips": 100}},
        "accelerator": {
            "worlds": {"synthetic.clips": 800},
            "worlds_rl": {"synthetic.clips": 240},
            "sft": {**_LOADED, "train.steps": 700, "train.batch_size": 96},
            "cold_start": {**_LOADED, "train.steps": 100, "train.batch_size": 96},
            "control": {**_LOADED, "train.batch_size": 96},
            "grpo_without_st": {"train.steps": 60},
            "grpo": {"train.steps": 60},
        },
        "smoke": {
            "worlds": _FEW_WORLDS,
            "questions": {"preset": "all", "questions.per_clip": 8},
            "worlds_rl": _FEW_WORLDS,
            "questions_rl": {"preset": "all", "questions.per_clip": 8},
            "bench": {"synthetic.clips": 24, "synthetic.height": 64, "synthetic.width": 64},
            "sft": _FEW,
            "cold_start": _FEW,
            "control": _FEW,
            "grpo_without_st": _FEW_SAMPLES,
            "grpo": _FEW_SAMPLES,
        },
    }
)
