"""Keys of supervised fine-tuning, in the groups that reinforcement learning takes its own from."""

from configs.published import SIZES
from configs.schema import Key
from configs.tables.shared import MESH_KEYS, MODEL_KEYS, VIDEO_KEYS, run_keys, take

TRAINED_KEYS = (
    *take(MODEL_KEYS, "path", "chat_template", "dtype", "attention"),
    Key(
        "model.remat",
        "auto",
        "decoder activations: keep them, keep the results of its matrix products, of all but the widest, or recompute "
        "each layer in backward; 'auto': the fastest that fits the devices, 'none' on a CPU",
        choices=("auto", "none", "dots", "dots_except_mlp", "full"),
        free=True,
    ),
    Key("model.vision_remat", "full", "the same for a trained vision tower", choices=("none", "full"), free=True),
    Key(
        "model.adapter",
        "",
        "start from this adapter: workdir or checkpoints folder of an earlier run, or a PEFT folder; '' = a fresh one",
        bucket=True,
    ),
    Key("model.step", -1, "which checkpoint of that run, by its step; -1 = the newest", low=-1),
    Key(
        "model.published",
        "",
        "a published size: plans need no model.path with it, and a model.path has to be of it",
        choices=("", *SIZES),
        free=True,
    ),
)
DATA_KEYS = (
    Key(
        "data.path",
        "",
        "records: JSON list, JSONL file, or a TFDS set's version folder (folder@split)",
        content=True,
        bucket=True,
    ),
    Key("data.root", "", "folder that the records' media paths are relative to", content=True, bucket=True),
    Key(
        "data.eval_path",
        "",
        "held-out records in the same forms: their mean loss is logged as eval_loss; '' = none. Every process reads it",
        content=True,
        bucket=True,
    ),
    Key("data.eval_root", "", "folder of their media; '' = data.root", content=True, bucket=True),
    Key("data.max_tokens", 8192, "a record with more tokens than this is quarantined, never cut", low=16, high=1 << 20),
    Key(
        "data.mixture",
        (),
        "in place of data.path: 'path::root::rate' each, rates as shares of groups",
        content=True,
        bucket=True,
        element=str,
    ),
    Key(
        "data.questions_per_video",
        1,
        "most questions about a clip that share its prefix; divides the batch",
        low=1,
        high=4096,
    ),
    Key(
        "data.rows",
        0,
        "rows of a micro-batch, over all hosts; 0 = one per group of questions. Four clips a row waste least padding",
        low=0,
        free=True,
    ),
    Key(
        "data.workers",
        0,
        "processes that decode and encode ahead; 0 = a thread of the main one",
        low=0,
        high=1024,
        free=True,
    ),
    Key(
        "data.max_quarantine_rate", 0.01, "the run stops above this share of unusable records", low=0, high=1, free=True
    ),
    Key(
        "data.prefix_buckets",
        (256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
        "padded lengths of a row's prefix region (system text and videos); one compiled step each",
        free=True,
    ),
    Key(
        "data.branch_buckets",
        (32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024),
        "padded lengths of a branch: the rest of a prompt and its answer",
        free=True,
    ),
    Key(
        "data.sample",
        "",
        "'tiny' = a sample world and a tiny random model for what is not set; 'base' = for records of yours, a random "
        "model of the shape of the quickstart's base, with tokens for what phrases.json beside them lists",
        choices=("", "tiny", "base"),
    ),
)
PROMPT_KEYS = (
    Key("prompt.system", "", "system prompt for records that bring none; '' = none", content=True),
    Key("prompt.system_file", "", "file to read that prompt from instead", content=True, bucket=True),
)
LORA_KEYS = (
    Key("lora.rank", 128, "rank of the adapter", low=1, high=16384, adapter=True),
    Key("lora.alpha", 256.0, "the adapter is scaled by alpha / rank", low=0, adapter=True),
    Key("lora.dropout", 0.0, "share of the adapter's inputs that is dropped in training", low=0, high=0.99),
    Key("lora.targets", ("q_proj", "k_proj", "v_proj", "o_proj"), "decoder projections with an adapter", adapter=True),
)
OPTIM_KEYS = (
    Key(
        "optim.name",
        "adamw",
        "optimiser: AdamW, or Muon for matrices (orthogonalised momentum) with AdamW for the rest, faster from scratch",
        choices=("adamw", "muon"),
    ),
    Key("optim.lr", 2e-5, "peak learning rate", low=0, high=1000),
    Key("optim.warmup_ratio", 0.01, "share of the steps spent on linear warm-up", low=0, high=1),
    Key("optim.schedule", "cosine", "what follows the warm-up", choices=("cosine", "constant")),
    Key("optim.b1", 0.9, "Adam: decay of the first moment", low=0, high=0.999999),
    Key("optim.b2", 0.999, "Adam: decay of the second moment", low=0, high=0.999999),
    Key("optim.eps", 1e-8, "Adam: added to the denominator", low=0),
    Key("optim.weight_decay", 0.0, "decoupled weight decay", low=0),
    Key("optim.clip_norm", 1.0, "global gradient norm is clipped to this", low=0),
)
TRAIN_KEYS = (
    Key("train.batch_size", 8, "examples per step, over all devices", low=1, high=1 << 20),
    Key("train.accumulation", 1, "micro-batches per optimiser step; divides the batch", low=1, free=True),
    Key(
        "train.trainable",
        ("lora",),
        "what is trained: 'lora', 'full' (the language model), or patterns of parameter names, '!' before one excludes",
        adapter=True,
    ),
    Key("train.steps", 30000, "optimiser steps", low=1),
    Key("train.log_every", 10, "steps between log lines", low=1, free=True),
    Key("train.checkpoint_every", 500, "steps between checkpoints", low=1, free=True),
    Key("train.keep_checkpoints", 3, "newest checkpoints kept", low=1, free=True),
    Key(
        "train.keep_best",
        0,
        "checkpoints kept besides these for their loss: that of data.eval_path if it is set, else of training",
        low=0,
        free=True,
    ),
    Key("train.eval_every", 500, "steps between measurements of data.eval_path, besides checkpoints", low=1, free=True),
    Key(
        "train.trace_steps",
        (),
        "steps whose device trace (XProf) is written to trace/, e.g. (10, 11)",
        free=True,
        element=int,
    ),
    Key(
        "train.watchdog_s",
        -1.0,
        "seconds without progress until it ends with where it hangs; 0 = off, -1 = 1800 with several processes",
        low=-1,
        free=True,
    ),
    Key("train.resume", True, "go on from the newest checkpoint of the workdir, if there is one", free=True),
    Key("train.loss_chunk", 1024, "supervised positions whose logits exist at a time", low=1, high=1 << 20, free=True),
)
SFT_KEYS = (
    *(*run_keys("sft"), *TRAINED_KEYS, *MESH_KEYS, *VIDEO_KEYS),
    *(*DATA_KEYS, *PROMPT_KEYS, *LORA_KEYS, *OPTIM_KEYS, *TRAIN_KEYS),
)
