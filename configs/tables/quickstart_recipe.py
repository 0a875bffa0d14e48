"""The recipe of the quickstart: its worlds, its questions, how a tiny base model is made and then taught to measure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# What all worlds of the quickstart look like: such that a tiny model can measure in them at 96 x 96 pixels. Objects of
# a shape are of one size and stand on the floor, the camera is at one height and does not turn, so that where
# something is in the picture says where it is in the room. One thing a room: of two, this model takes either.
WORLDS: Mapping[str, Any] = MappingProxyType(
    {
        "synthetic.frames": 8,
        "synthetic.fps": 4.0,
        "synthetic.plain": True,
        "synthetic.objects": (1, 1),
        "synthetic.object_travel": (0.25, 3.0),
        "synthetic.object_size": 1.6,
        "synthetic.size_spread": 0.0,
        "synthetic.tumble": 0.0,
        "synthetic.camera_height": (1.5, 1.5),
        "synthetic.camera_tilt": (14.0, 14.0),
        "synthetic.turn": 0.0,
    }
)
# How every stage sees a clip: all frames, 96 x 96 pixels: 3 x 3 tokens for two of them, so that a token's place tells
# where an object stands. One clip a row costs a CPU least.
_SEEN: Mapping[str, Any] = MappingProxyType(
    {
        "data.max_tokens": 512,
        "data.prefix_buckets": (64, 128, 512),
        "data.branch_buckets": (32, 40, 48, 72, 104, 128, 512),
        "model.dtype": "float32",
        "model.remat": "none",
        "model.vision_remat": "none",
        "video.num_frames": 8,
        "video.max_pixels": 9216,
    }
)
_FROM_NOTHING: Mapping[str, Any] = MappingProxyType(
    {
        **_SEEN,
        "data.root": "runs/captions",
        "optim.name": "muon",
        "optim.b2": 0.98,
        "optim.weight_decay": 0.01,
        "optim.warmup_ratio": 0.02,
        "train.trainable": ("full", "vision/.*"),
        "train.log_every": 20,
        "train.checkpoint_every": 300,
        "train.loss_chunk": 2048,
    }
)
# At first only the letters of options, in text without clips, one a text: from a random start it is learned so, and
# beside clips not by every start.
LETTERS: Mapping[str, Any] = MappingProxyType(
    {
        **_FROM_NOTHING,
        "data.path": "runs/captions/letters.json",
        "data.sample": "base",
        "data.questions_per_video": 1,
        "optim.lr": 0.01,
        "train.batch_size": 128,
        "train.steps": 400,
    }
)
# Then the same beside clips, and what spatial states come to. Later, beside captions, neither is learned, but what is
# known by then is kept by a text or two a clip.
MATCHING: Mapping[str, Any] = MappingProxyType(
    {
        **_FROM_NOTHING,
        "data.path": "runs/captions/matching.json",
        "data.questions_per_video": 8,
        "model.path": "runs/letters/model",
        "optim.lr": 0.01,
        "train.batch_size": 128,
        "train.steps": 600,
    }
)
# Then to see: where things are, as states in camera heights, and captions in words. Words alone teach so small a model
# much less in the same time.
PLACING: Mapping[str, Any] = MappingProxyType(
    {
        **_FROM_NOTHING,
        "data.path": "runs/captions/placing.json",
        "data.questions_per_video": 4,
        "model.path": "runs/matching/model",
        "optim.lr": 0.015,
        "train.batch_size": 160,
        "train.steps": 1500,
    }
)
# Last, all of it, questions about told states, and states behind the questions that fine-tuning asks. Their texts are
# long, and all branches of a step are as long as the longest.
ASKING: Mapping[str, Any] = MappingProxyType(
    {
        **PLACING,
        "data.path": "runs/captions/asking.json",
        "model.path": "runs/placing/model",
        "optim.lr": 0.012,
        "train.batch_size": 128,
        "train.steps": 420,
    }
)
# First against last frame; options far enough apart for rough measurement; answers that say where things are in both
# frames, what that comes to, and which option it is.
QUESTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "questions.num_frames": 8,
        "questions.min_gap": 0.99,
        "questions.spacing": (
            "camera_absolute_distance=1.6",
            "object_absolute_distance=1.6",
            "object_camera_absolute_distance=1.25",
        ),
        "questions.answers": "states",
        "questions.draws": 6,
        "questions.margin": 0.15,
    }
)
# Clips for pre-training, and the rules of the questions about told states.
PRETRAINING_CLIPS: Mapping[str, Any] = MappingProxyType(
    {
        **WORLDS,
        **QUESTIONS,
        "seed": 1000,
        "synthetic.clips": 16000,
        "synthetic.height": 96,
        "synthetic.width": 96,
        "questions.draws": 1,
        "workers": 2,
    }
)
SFT: Mapping[str, Any] = MappingProxyType(
    {
        **_SEEN,
        "data.questions_per_video": 6,
        "lora.rank": 32,
        "lora.alpha": 32.0,
        "lora.targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "optim.name": "muon",
        "optim.lr": 0.008,
        "optim.b2": 0.98,
        "optim.warmup_ratio": 0.03,
        "train.batch_size": 48,
        "train.steps": 450,
        "train.log_every": 10,
        "train.checkpoint_every": 100,
        "train.loss_chunk": 1024,
    }
)
# Reasoning with spatial states (curate.py:cold_start with cold_start.style=brief), from the adapter of SFT.
COLD_START: Mapping[str, Any] = MappingProxyType({**SFT, "optim.lr": 0.005, "train.steps": 80})
# Advantages are divided by the spread of a whole batch: by that of a group, eight right answers whose centres differ by
# millimetres would pull as hard as right and wrong ones. It takes some 300 steps until greedy answers show what is
# learned; fewer rather harm (benchmarks/RESULTS.md).
GRPO: Mapping[str, Any] = MappingProxyType(
    {
        **{name: value for name, value in _SEEN.items() if name not in ("data.branch_buckets", "model.vision_remat")},
        "lora.rank": SFT["lora.rank"],
        "lora.alpha": SFT["lora.alpha"],
        "lora.targets": SFT["lora.targets"],
        "optim.lr": 3e-4,
        "optim.b2": 0.99,
        "rollout.prompts": 16,
        "rollout.completions": 8,
        "rollout.max_new_tokens": 48,
        "rollout.buckets": (48,),
        "rollout.stop": ("</answer>",),
        "objective.beta": 0.0,
        "objective.scale": "batch",
        "train.steps": 60,
        "train.checkpoint_every": 20,
    }
)
