"""Keys that several tasks have, in groups."""

from __future__ import annotations

import dataclasses

from configs.schema import Key

RUN_KEYS = (
    Key("seed", 0, "seed of everything random in the run", low=0),
    Key("workdir", "", "where results go, also --workdir; '' = runs/<config>[-<variant>]", free=True, bucket=True),
    Key(
        "distributed",
        "off",
        "join several processes: 'auto' asks the cluster, 'explicit' reads JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        choices=("off", "auto", "explicit"),
        free=True,
    ),
)
MODEL_KEYS = (
    Key(
        "model.path",
        "",
        "Hugging Face folder of the base model: config, tokenizer and *.safetensors",
        content=True,
        bucket=True,
    ),
    Key(
        "model.adapter",
        "",
        "trained on it: a run's workdir (says the base, too), or a PEFT folder",
        content=True,
        bucket=True,
    ),
    Key("model.step", -1, "checkpoint of that run by its step; -1 = the newest", low=-1, content=True),
    Key(
        "model.chat_template",
        "auto",
        "prompts: as the folder's chat template says (Instruct without one), or in this form whatever it says",
        choices=("auto", "instruct", "thinking"),
    ),
    Key("model.dtype", "bfloat16", "dtype of weights and activations", choices=("bfloat16", "float32")),
    Key("model.attention", "auto", "attention backend", choices=("auto", "xla", "cudnn", "splash"), free=True),
)
MESH_KEYS = (
    Key("mesh.data", -1, "devices along the data axis; -1 = all that are left", low=-1, free=True),
    Key("mesh.fsdp", 1, "devices along the axis that shards parameters; -1 = all that are left", low=-1, free=True),
    Key("mesh.tensor", 1, "devices along the tensor-parallel axis; -1 = all that are left", low=-1, free=True),
)
VIDEO_KEYS = (
    Key("video.num_frames", 32, "at most this many frames of a clip", low=2, high=65536),
    Key("video.fps", 0.0, "frames per second to sample at; 0 = use num_frames alone", low=0, high=1000),
    Key(
        "video.resize_rule",
        "per_frame",
        "what the pixel budget bounds: each frame (the paper's training), or the whole clip (HF video processor)",
        choices=("per_frame", "total", "qwen_vl_utils"),
    ),
    Key("video.min_pixels", 0, "lower pixel budget, an area; 0 = the rule's: 784 a frame, 'total': the model's", low=0),
    Key("video.max_pixels", 0, "upper one; 0 = the rule's: 50176 = 224 x 224 a frame, 'total': the model's", low=0),
    Key("video.outer_markers", False, "keep a vision_start/vision_end pair around a whole clip, as HF 5.x does"),
    Key(
        "video.position_rule",
        "release",
        "Qwen2.5-VL temporal positions: as released, or as transformers 5.17 or 5.23 computes them",
        choices=("release", "hf517", "hf523"),
    ),
    Key("video.decode_timeout_s", 60.0, "seconds a clip or image may take to decode", low=0, free=True),
    Key("video.cache_gib", 100.0, "GiB of this machine's disk for clips that are in a bucket", low=0, free=True),
    Key("video.decode_threads", 1, "of the codec, for each clip that is decoded", low=1, high=64, free=True),
    Key(
        "video.sampling",
        "uniform",
        "which frames: evenly spread over the clip, or by the rule of the named processor; with fps or without",
        choices=("uniform", "qwen3_vl", "qwen2_5_vl", "qwen_vl_utils"),
    ),
)


def run_keys(task: str) -> tuple[Key, ...]:
    """Return the keys that the table of every task begins with."""
    return (Key("task", task, "which task the config is for", choices=(task,)), *RUN_KEYS)


def take(group: tuple[Key, ...], *names: str, **defaults: bool | int | float | str | tuple) -> tuple[Key, ...]:
    """Return keys of a group by the last part of their names, those in `defaults` with another default.

    Without `names`, all of them.
    """
    known = {key.name.rpartition(".")[2]: key for key in group}
    known |= {name: dataclasses.replace(known[name], default=value) for name, value in defaults.items()}
    return tuple(known[name] for name in (*names, *defaults)) if names else tuple(known.values())
