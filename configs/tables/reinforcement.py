"""Keys of reinforcement learning on completions; what it shares with supervised fine-tuning is taken from there."""

from __future__ import annotations

import dataclasses

from configs.schema import Key
from configs.tables.shared import RUN_KEYS, video_keys
from configs.tables.training import SFT_KEYS

_SHARED = {key.name: key for key in SFT_KEYS}


def _shared(*names: str, **defaults: bool | int | float | str | tuple) -> tuple[Key, ...]:
    """Keys of supervised fine-tuning, some with other defaults ('group__name' for group.name)."""
    changed = {name.replace("__", "."): value for name, value in defaults.items()}
    kept = [_SHARED[name] for name in names]
    return (*kept, *(dataclasses.replace(_SHARED[name], default=value) for name, value in changed.items()))


GRPO_KEYS = (
    Key("task", "grpo", "which task the config is for", choices=("grpo",)),
    *RUN_KEYS,
    *_shared("model.path", "model.dtype", "model.attention", "model.remat", "model.vision_remat"),
    *_shared("model.published", model__adapter="runs/cold_start"),
    *_shared("mesh.data", "mesh.fsdp", "mesh.tensor"),
    *video_keys("video"),
    *_shared("data.path", "data.root", "data.mixture", "data.max_tokens", "data.prefix_buckets", "data.workers"),
    *_shared("data.max_quarantine_rate"),
    *_shared("prompt.system_file", prompt__system="st_cot"),
    *_shared("lora.rank", "lora.alpha", "lora.targets"),
    *_shared("optim.warmup_ratio", "optim.schedule", "optim.b1", "optim.b2", "optim.eps", "optim.weight_decay"),
    *_shared("optim.clip_norm", optim__lr=5e-5),
    Key("rollout.prompts", 2, "prompts of a step", low=1),
    Key("rollout.completions", 12, "completions of each prompt", low=2),
    Key("rollout.temperature", 1.0, "of sampling; log-probs are those at this temperature", low=0.01),
    Key("rollout.max_new_tokens", 4096, "longest completion, in tokens", low=1),
    Key("rollout.stop", (), "texts that end a completion besides the end token, e.g. ('</answer>',)"),
    Key(
        "rollout.buckets",
        (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
        "padded lengths of completions in the learner; one compiled step each",
    ),
    Key("rollout.prompts_at_once", 0, "prompts in the sampler at a time, which bounds its caches; 0 = all", low=0),
    Key("rollout.chunk", 32, "tokens between two looks at which completions have ended", low=1),
    Key("rollout.ladder_ratio", 2, "sizes of the sampler's arrays are powers of this; larger compiles less", low=2),
    Key(
        "rollout.tensor",
        0,
        "devices that share the weights while sampling, where the learner's mesh splits them otherwise (fsdp): the "
        "base weights are then held a second time; 0 = the learner's mesh",
        low=0,
    ),
    Key(
        "rollout.ahead",
        0,
        "1 = the completions of a step are drawn before the update of the one before it, while the host reads data",
        choices=(0, 1),
    ),
    Key("rollout.max_rounds", 4, "most rounds of prompts that dynamic sampling draws to fill a step", low=1),
    Key(
        "reward.functions",
        ("paper::1.0",),
        "'name::weight' each: a preset (paper, release), a component (accuracy, format, camera, object) or the path of "
        "a function, package.module:function",
    ),
    Key("objective.preset", "paper", "see the table in grpo/presets.py; the keys below change single pieces of it"),
    Key("objective.scale", "", "'' = the preset's: divisor of the advantages", choices=("", "group", "batch", "none")),
    Key(
        "objective.ratio",
        "",
        "'' = the preset's: level of the importance ratio",
        choices=("", "token", "sequence", "sequence_token"),
    ),
    Key("objective.surrogate", "", "'' = the preset's", choices=("", "clip", "cispo")),
    Key("objective.eps_low", -1.0, "ratios are clipped to 1 - this; -1 = the preset's", low=-1),
    Key("objective.eps_high", -1.0, "and to 1 + this; -1 = the preset's", low=-1),
    Key("objective.beta", -1.0, "weight of the KL term; -1 = the preset's", low=-1),
    Key("objective.kl", "", "'' = the preset's: estimator of the KL divergence", choices=("", "k1", "k2", "k3")),
    Key(
        "objective.reduction",
        "",
        "'' = the preset's: how tokens and completions are averaged",
        choices=("", "sequence_mean", "token_mean", "constant"),
    ),
    Key(
        "objective.overlong",
        "",
        "'' = the preset's: what becomes of completions that the cap cut off",
        choices=("", "keep", "mask", "soft"),
    ),
    Key(
        "objective.dynamic_sampling",
        "",
        "'' = the preset's: only prompts with different rewards",
        choices=("", "on", "off"),
    ),
    Key("objective.gap_bound", -1.0, "nats; a larger sampler-learner gap is corrected; -1 = the preset's", low=-1),
    Key("objective.importance_cap", -1.0, "greatest weight of that correction; -1 = the preset's", low=-1),
    Key("objective.iterations", 1, "updates on the same completions (mu)", low=1),
    Key(
        "learner.completions_per_row",
        0,
        "completions of a prompt that share a row, divides rollout.completions; 0 = all. Fewer need less memory and "
        "can be split over more devices, but compute the prompt more often",
        low=0,
    ),
    Key("eval.path", "", "held-out prompts, a file of records or a TFDS set; '' = none"),
    Key("eval.root", "", "their media folder; '' = data.root"),
    Key("eval.every", 100, "steps between evaluations on them; the first is before the first step", low=1),
    Key("eval.limit", 200, "at most this many of them", low=1),
    *_shared("train.accumulation", "train.trainable", "train.trace_steps", "train.watchdog_s", "train.resume"),
    *_shared("train.loss_chunk", "train.keep_checkpoints", "train.keep_best"),
    *_shared(train__steps=15000, train__log_every=1, train__checkpoint_every=100),
    Key("train.completions_every", 1, "steps between those whose completions are written down; 0 = none", low=0),
)
