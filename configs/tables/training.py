"""Keys of supervised fine-tuning."""

from __future__ import annotations

from configs.schema import Key
from configs.tables.shared import RUN_KEYS, video_keys

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
        "start from this adapter: workdir or checkpoints folder of an earlier run, or a PEFT folder; '' = a fresh one",
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
    Key(
        "data.eval_path",
        "",
        "held-out records in the same forms: their mean loss is logged as eval_loss; '' = none. Every process reads it",
    ),
    Key("data.eval_root", "", "folder of their media; '' = data.root"),
    Key("data.max_tokens", 8192, "a record with more tokens than this is quarantined, never cut", low=16),
    Key(
        "data.mixture",
        (),
        "several data sets in place of data.path: 'path::root::rate' each; rates are shares of the question groups",
    ),
    Key("data.questions_per_video", 1, "most questions about a clip that share its prefix; divides the batch", low=1),
    Key(
        "data.rows",
        0,
        "rows of a step, over all hosts; 0 = one per group of questions. Clips in one row pad each other: with about "
        "four of them a row wastes least (benchmarks/padding.py)",
        low=0,
    ),
    Key("data.workers", 0, "processes that decode and encode; 0 = in the main process", low=0),
    Key("data.max_quarantine_rate", 0.01, "the run stops once a larger share of the records is unusable", low=0),
    Key(
        "data.prefix_buckets",
        (256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
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
    Key(
        "train.keep_best",
        0,
        "checkpoints kept besides these for their loss: that of data.eval_path if it is set, else of training",
        low=0,
    ),
    Key(
        "train.eval_every", 500, "steps between measurements of data.eval_path; checkpoints are measured as well", low=1
    ),
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
