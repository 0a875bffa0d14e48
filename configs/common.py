"""Every config key of every task, with its default and its meaning.

A task's table is the whole schema: `run.py` refuses any key that is not in it. The builders return the full locked
ConfigDict; a config file starts from one of them and changes what it needs.
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs.schema import ConfigError, Key, build, did_you_mean

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


SFT_KEYS = (
    Key("task", "sft", "which task the config is for", choices=("sft",)),
    *RUN_KEYS,
    Key("model.path", "", "Hugging Face folder of the base model: config.json, tokenizer.json, *.safetensors"),
    Key("model.dtype", "bfloat16", "dtype of weights and activations", choices=("bfloat16", "float32")),
    Key(
        "model.attention",
        "auto",
        "attention backend; 'auto' picks for the device",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    Key(
        "model.remat",
        "full",
        "decoder activations: keep them, recompute each layer in backward, or keep its matrix products only",
        choices=("none", "full", "dots"),
    ),
    Key("model.vision_remat", "full", "the same for a vision tower that is trained", choices=("none", "full")),
    Key(
        "model.adapter",
        "",
        "start from this adapter: workdir or checkpoints folder of an earlier run; '' = a fresh one",
    ),
    Key(
        "model.published",
        "",
        "plans only: a published size in place of model.path",
        choices=("", "2b", "4b", "8b", "32b", "30b_a3b", "qwen2_5_vl_7b"),
    ),
    Key("mesh.data", -1, "devices along the data axis; -1 = all that are left", low=-1),
    Key("mesh.fsdp", 1, "devices along the axis that shards parameters; -1 = all that are left", low=-1),
    Key("mesh.tensor", 1, "devices along the tensor-parallel axis; -1 = all that are left", low=-1),
    *video_keys("video"),
    Key(
        "data.path",
        "",
        "training records: a JSON list, a JSONL file, or the version folder of a TFDS set (folder@split)",
    ),
    Key("data.root", "", "folder that the records' media paths are relative to"),
    Key("data.max_tokens", 8192, "a record with more tokens than this is quarantined, never cut", low=16),
    Key(
        "data.mixture",
        (),
        "several data sets in place of data.path: 'path::root::rate' each; rates are shares of the question groups",
    ),
    Key("data.questions_per_video", 1, "most questions about a clip that share its prefix; divides the batch", low=1),
    Key("data.rows", 0, "rows of a step, over all hosts; 0 = one per group of questions", low=0),
    Key("data.workers", 0, "processes that decode and encode; 0 = in the main process", low=0),
    Key("data.max_quarantine_rate", 0.01, "the run stops once a larger share of the records is unusable", low=0),
    Key(
        "data.prefix_buckets",
        (256, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192),
        "padded lengths of a row's prefix region (system text and videos); one compiled step each",
    ),
    Key(
        "data.branch_buckets",
        (32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024),
        "padded lengths of a branch: the rest of a prompt and its answer",
    ),
    Key(
        "data.sample",
        "",
        "'tiny' = for what is not configured, write a sample world and a tiny random model into the workdir",
        choices=("", "tiny"),
    ),
    Key("prompt.system", "", "system prompt for records that bring none; '' = none"),
    Key("prompt.system_file", "", "file to read that prompt from instead"),
    Key("lora.rank", 128, "rank of the adapter", low=1),
    Key("lora.alpha", 256.0, "the adapter is scaled by alpha / rank", low=0),
    Key("lora.dropout", 0.0, "share of the adapter's inputs that is dropped in training", low=0),
    Key("lora.targets", ("q_proj", "k_proj", "v_proj", "o_proj"), "decoder projections that get an adapter"),
    Key("optim.lr", 2e-5, "peak learning rate", low=0),
    Key("optim.warmup_ratio", 0.01, "share of the steps spent on linear warm-up", low=0),
    Key("optim.schedule", "cosine", "what follows the warm-up", choices=("cosine", "constant")),
    Key("optim.b1", 0.9, "Adam: decay of the first moment", low=0),
    Key("optim.b2", 0.999, "Adam: decay of the second moment", low=0),
    Key("optim.eps", 1e-8, "Adam: added to the denominator", low=0),
    Key("optim.weight_decay", 0.0, "decoupled weight decay", low=0),
    Key("optim.clip_norm", 1.0, "global gradient norm is clipped to this", low=0),
    Key("train.batch_size", 8, "examples per step, over all devices", low=1),
    Key("train.accumulation", 1, "micro-batches per optimiser step; divides the batch", low=1),
    Key(
        "train.trainable",
        ("lora",),
        "what is trained: 'lora', 'full' (the language model), or patterns of parameter names, '!' before one excludes",
    ),
    Key("train.steps", 30000, "optimiser steps", low=1),
    Key("train.log_every", 10, "steps between log lines", low=1),
    Key("train.checkpoint_every", 500, "steps between checkpoints", low=1),
    Key("train.keep_checkpoints", 3, "newest checkpoints kept", low=1),
    Key("train.keep_best", 0, "checkpoints kept besides these for their training loss", low=0),
    Key("train.trace_steps", (), "steps whose device trace (XProf) is written to trace/, e.g. (10, 11)"),
    Key(
        "train.watchdog_s",
        0.0,
        "seconds without progress after which the run says where it hangs and ends; 0 = off",
        low=0,
    ),
    Key("train.resume", True, "go on from the newest checkpoint of the workdir, if there is one"),
    Key("train.loss_chunk", 1024, "supervised positions whose logits exist at a time", low=1),
)

INFER_KEYS = (
    Key("task", "infer", "which task the config is for", choices=("infer",)),
    *RUN_KEYS,
    Key("model", "", "Hugging Face folder of the model"),
    Key("video", "", "video file to ask about; '' = none"),
    Key("image", "", "image file to ask about; '' = none"),
    Key("question", "", "what to ask"),
    Key("system_file", "", "file with a system prompt; '' = none"),
    Key("max_new_tokens", 256, "longest answer, in tokens", low=1),
    Key("temperature", 0.0, "0 = greedy", low=0),
    Key("top_k", 0, "sample among this many best tokens; 0 = all", low=0),
    Key("top_p", 1.0, "sample among the smallest set of tokens with this probability", low=0),
    Key("dtype", "bfloat16", "dtype of weights and activations", choices=("bfloat16", "float32")),
    Key(
        "attention",
        "auto",
        "attention backend; 'auto' picks for the device",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    *video_keys("frames"),
)

VERIFY_KEYS = (
    Key("task", "verify", "which task the config is for", choices=("verify",)),
    *RUN_KEYS,
    Key("model", "", "Hugging Face folder of the model; '' = the model folders inside golden"),
    Key("golden", "", "recorded reference: one model's folder, a root of several, or a processor folder"),
    Key("case", "", "check only this case; '' = all"),
    Key(
        "position_rule",
        "auto",
        "Qwen2.5-VL temporal positions; 'auto' = what the recording says",
        choices=("auto", "release", "hf517", "hf523"),
    ),
    Key(
        "attention",
        "xla",
        "attention backend",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    Key("tol.patches", 1e-6, "largest absolute error of the pixel patches", low=0),
    Key("tol.vision", 2e-5, "largest absolute error of the vision tensors", low=0),
    Key("tol.hidden", 2e-4, "largest absolute error of the decoder's hidden states", low=0),
    Key("tol.logits", 1e-4, "largest absolute error of the logits", low=0),
    Key("tol.loss", 1e-5, "largest absolute error of the loss", low=0),
    Key("tol.grad_rel", 1e-3, "largest relative error of a gradient's norm", low=0),
)

CURATE_KEYS = (
    Key("task", "curate", "which task the config is for", choices=("curate",)),
    *RUN_KEYS,
    Key(
        "source",
        "synthetic",
        "where clips come from: rendered rooms with exact truth, Stereo4D annotations, stereo videos alone, "
        "SpatialTrackerV2 + MoGe-2. 'cold_start' writes reasoning for questions that are there already, 'describe' "
        "names objects for the other sources",
        choices=("synthetic", "stereo4d", "stereo", "monocular", "cold_start", "describe"),
    ),
    Key("input", "", "all but synthetic: folder with the clips' files; what is expected there is in the README"),
    Key("decode_timeout_s", 60.0, "seconds a clip may take to decode", low=0),
    Key("synthetic.clips", 400, "synthetic: clips to render", low=1),
    Key("synthetic.height", 64, "synthetic: pixels", low=16),
    Key("synthetic.width", 64, "synthetic: pixels", low=16),
    Key("synthetic.frames", 16, "synthetic: frames per clip", low=2),
    Key("synthetic.fps", 8.0, "synthetic: frames per second", low=0.1),
    Key("synthetic.stereo", False, "synthetic: render and write the right eye too"),
    Key(
        "stereo4d.frames",
        "video",
        "stereo4d: left frames as <clip>-left_rectified.mp4, or as a folder of images of that name",
        choices=("video", "images"),
    ),
    Key(
        "stereo.layout",
        "pair",
        "stereo: two videos per clip, or one that packs both views",
        choices=("pair", "left_right", "right_left", "top_bottom", "bottom_top"),
    ),
    Key("stereo.fov_degrees", 60.0, "stereo: horizontal field of view of one eye, unless <clip>-clip.json says", low=1),
    Key("stereo.baseline", 0.0, "stereo: metres between the eyes; 0 = assume 0.063, as Stereo4D does", low=0),
    Key("stereo.max_frames", 300, "stereo: a longer clip is rejected", low=2),
    Key("stereo.max_disparity", 0, "stereo: pixels searched; 0 = an eighth of the width", low=0),
    Key("monocular.max_spread", 0.1, "monocular: relative spread of the scale up to which it counts as metric", low=0),
    Key("questions.num_frames", 32, "frames of a clip that the model will see; questions count these", low=2),
    Key("questions.per_clip", 28, "most questions proposed per clip, before balancing", low=1),
    Key(
        "preset",
        "mllm4d_2m",
        "shares, caps and motion of the training set; 'all' = every question, unbalanced (for a handful of clips, "
        "where equal shares would leave next to nothing)",
        choices=("mllm4d_2m", "r1_30k", "all"),
    ),
    Key("total", 0, "questions of the training set; 0 = as many as the shares allow", low=0),
    Key("bench_total", 0, "questions of the held-out set; 0 = as many as the shares allow", low=0),
    Key("bench_share", 0.2, "share of the source videos held out for it", low=0),
    Key("tfds.write", False, "also write a TFDS data set (ArrayRecord): frames once per clip, questions beside them"),
    Key("tfds.max_pixels", 0, "tfds: area of the stored frames; 0 = as in the video", low=0),
    Key("tfds.factor", 32, "tfds: their sides are multiples of this; 32 for Qwen3-VL, 28 for Qwen2.5-VL", low=1),
    Key("tfds.jpeg_quality", 95, "tfds: quality of the stored frames, 1 to 100", low=1),
    Key("tfds.clips_per_shard", 256, "tfds: clips per file", low=1),
    Key("tfds.runner", "", "tfds: Beam runner, e.g. 'FnApiRunner' (this machine) or 'DataflowRunner'; '' = no Beam"),
    Key("tfds.runner_options", (), "tfds: command-line options of that runner"),
    Key("report.clips", 8, "clips shown in report.html", low=0),
    Key(
        "cold_start.records", "", "cold_start: questions, JSONL as in MLLM4D-R1-30k.jsonl (a curation's train_r1.jsonl)"
    ),
    Key("cold_start.root", "", "cold_start: media root; '' = the folder of the records"),
    Key("cold_start.per_scenario", 2000, "cold_start: questions drawn per scenario", low=1),
    Key("cold_start.paths", 3, "cold_start: reasoning paths per question", low=1),
    Key(
        "cold_start.filter",
        "best_of_sample",
        "cold_start: keep the best path of each question that reaches the threshold, or every path that does",
        choices=("best_of_sample", "every_path"),
    ),
    Key("cold_start.total", 7000, "cold_start: records, in equal shares over the scenarios; 0 = all that pass", low=0),
    Key(
        "cold_start.reward", "paper", "cold_start: preset of the reward that judges paths", choices=("paper", "release")
    ),
    Key(
        "teacher.kind",
        "oracle",
        "who writes reasoning or descriptions: the measured values (cold_start only), a model behind "
        "MLLM4D_TEACHER_URL, or its stored replies",
        choices=("oracle", "endpoint", "replay"),
    ),
    Key("teacher.model", "", "teacher: the model's name at the endpoint"),
    Key("teacher.num_frames", 32, "teacher: most frames it is sent per request", low=2),
    Key("teacher.temperature", 1.0, "teacher: for reasoning; descriptions are asked for at 0", low=0),
    Key("teacher.cache", "", "teacher: folder of stored replies; '' = replies/ in the workdir"),
    Key("teacher.concurrency", 4, "teacher: requests in flight", low=1),
    Key("teacher.requests_per_minute", 0.0, "teacher: limit on requests; 0 = none", low=0),
    Key("workers", 1, "processes; the result does not depend on it", low=1),
)

# task -> (its keys, the module whose run(config, workdir) does it, one line for --help)
TASKS = MappingProxyType(
    {
        "sft": (SFT_KEYS, "mllm4d_jax.train.sft", "supervised fine-tuning with LoRA on video question-answer records"),
        "curate": (
            CURATE_KEYS,
            "data_prep.curate",
            "make training and held-out questions from clips with known geometry",
        ),
        "infer": (INFER_KEYS, "mllm4d_jax.eval.infer", "answer a question about one video or image"),
        "verify": (VERIFY_KEYS, "mllm4d_jax.eval.verify", "compare a checkpoint's numbers with a recorded reference"),
    }
)


def task_keys(task: object) -> tuple[Key, ...]:
    """The key table of a task. Raises ConfigError naming the nearest task for a name that is none."""
    if task not in TASKS:
        hint = did_you_mean(task, TASKS) if isinstance(task, str) else ""
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, not {task!r}{hint}")
    return TASKS[task][0]


def sft() -> ml_collections.ConfigDict:
    """Defaults of supervised fine-tuning: the paper's Qwen3-VL-8B run."""
    return build(SFT_KEYS)


def infer() -> ml_collections.ConfigDict:
    """Defaults of answering one question."""
    return build(INFER_KEYS)


def verify() -> ml_collections.ConfigDict:
    """Defaults of the comparison with a recorded reference (always float32)."""
    return build(VERIFY_KEYS)


def curate() -> ml_collections.ConfigDict:
    """Defaults of making questions from clips."""
    return build(CURATE_KEYS)
