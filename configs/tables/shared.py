"""Keys that several tasks have."""

from __future__ import annotations

from configs.schema import Key

RUN_KEYS = (
    Key("seed", 0, "seed of everything random in the run", low=0),
    Key("workdir", "", "where results go; '' = runs/<config>[-<variant>]; the flag --workdir sets it too"),
    Key(
        "distributed",
        "off",
        "join a multi-process run first: 'auto' asks the cluster, 'explicit' reads JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        choices=("off", "auto", "explicit"),
    ),
)


def video_keys(group: str) -> tuple[Key, ...]:
    """The keys that say how a clip becomes frames and pixels, under `group` ("video" in SFT, "frames" in inference)."""
    return (
        Key(f"{group}.num_frames", 32, "at most this many frames of a clip", low=2),
        Key(f"{group}.fps", 0.0, "frames per second to sample at; 0 = use num_frames alone", low=0),
        Key(
            f"{group}.resize_rule",
            "per_frame",
            "what the pixel budget bounds: each frame (the paper's training), or the whole clip (HF video processor)",
            choices=("per_frame", "total", "qwen_vl_utils"),
        ),
        Key(
            f"{group}.min_pixels",
            0,
            "lower pixel budget, an area; 0 = the rule's own: 784 a frame (the paper's), the model folder's for "
            "'total'",
            low=0,
        ),
        Key(
            f"{group}.max_pixels",
            0,
            "upper pixel budget, an area; 0 = the rule's own: 50176 = 224 x 224 a frame (the paper's), the model "
            "folder's for 'total'",
            low=0,
        ),
        Key(f"{group}.outer_markers", False, "keep a vision_start/vision_end pair around a whole clip, as HF 5.x does"),
        Key(
            f"{group}.position_rule",
            "release",
            "Qwen2.5-VL temporal positions: as released, or as transformers 5.17 or 5.23 computes them",
            choices=("release", "hf517", "hf523"),
        ),
        Key(f"{group}.decode_timeout_s", 60.0, "seconds a clip may take to decode", low=0),
        Key(
            f"{group}.sampling",
            "uniform",
            "which frames: evenly spaced over the clip, or the rule of the named processor (needs fps)",
            choices=("uniform", "qwen3_vl", "qwen2_5_vl", "qwen_vl_utils"),
        ),
    )
