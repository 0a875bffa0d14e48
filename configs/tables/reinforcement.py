"""Keys of reinforcement learning on completions; what it shares with supervised fine-tuning is taken from there."""

from configs.schema import Key
from configs.tables.shared import MESH_KEYS, VIDEO_KEYS, run_keys, take
from configs.tables.training import DATA_KEYS, LORA_KEYS, OPTIM_KEYS, PROMPT_KEYS, TRAIN_KEYS, TRAINED_KEYS

GRPO_KEYS = (
    *run_keys("grpo"),
    *take(TRAINED_KEYS, adapter="runs/cold_start"),
    *MESH_KEYS,
    *VIDEO_KEYS,
    *take(DATA_KEYS, "path", "root", "mixture", "max_tokens", "prefix_buckets", "workers", "max_quarantine_rate"),
    *take(PROMPT_KEYS, system="st_cot"),
    *take(LORA_KEYS, "rank", "alpha", "targets"),
    *take(OPTIM_KEYS, lr=5e-5),
    Key("rollout.prompts", 2, "prompts of a step, over all hosts, which divide them", low=1, high=1 << 20),
    Key("rollout.completions", 12, "completions of each prompt", low=2, high=1 << 16),
    Key("rollout.temperature", 1.0, "of sampling; log-probs are those at this temperature", low=0.01, high=100),
    Key("rollout.max_new_tokens", 4096, "longest completion, in tokens", low=1, high=1 << 20),
    Key("rollout.stop", (), "texts that end a completion besides the end token, e.g. ('</answer>',)", element=str),
    Key(
        "rollout.buckets",
        (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
        "padded lengths of completions in the learner; one compiled step each",
        free=True,
    ),
    Key(
        "rollout.prompts_at_once",
        0,
        "prompts in the samplers of all hosts at a time (for memory), one that ends makes room for the next; 0 = all",
        low=0,
        high=1 << 20,
        free=True,
    ),
    Key(
        "rollout.completions_at_once",
        0,
        "completions of a prompt in the sampler at a time, one that ends makes room for the next; fewer, with more "
        "prompts, leave fewer places idle; 0 = all",
        low=0,
        high=1 << 16,
        free=True,
    ),
    Key(
        "rollout.chunk", 32, "tokens between two looks at which completions have ended", low=1, high=1 << 20, free=True
    ),
    Key(
        "rollout.ladder_ratio",
        2,
        "sizes in the sampler are powers of this; larger compiles less",
        low=2,
        high=1024,
        free=True,
    ),
    Key(
        "rollout.tensor",
        0,
        "devices of a host that share the weights while sampling, where the learner's mesh splits them (fsdp): the "
        "base weights are then held a second time; 0 = the learner's mesh",
        low=0,
        free=True,
    ),
    Key("rollout.ahead", 0, "1 = draw completions before the update of the step before", choices=(0, 1)),
    Key("rollout.max_rounds", 4, "most rounds of prompts that dynamic sampling draws to fill a step", low=1, high=1024),
    Key(
        "reward.functions",
        ("paper::1.0",),
        "'name::weight' each: a preset (paper, release), a component (accuracy, format, camera, object) or the path of "
        "a function, package.module:function",
    ),
    Key("objective.preset", "paper", "of grpo/presets.py; a key below that is not '' or -1 changes a piece of it"),
    Key("objective.scale", "", "divisor of the advantages", choices=("", "group", "batch", "none")),
    Key("objective.ratio", "", "level of the importance ratio", choices=("", "token", "sequence", "sequence_token")),
    Key("objective.surrogate", "", "policy term of a token", choices=("", "clip", "cispo")),
    Key("objective.eps_low", -1.0, "ratios are clipped to 1 - this", low=-1),
    Key("objective.eps_high", -1.0, "and to 1 + this", low=-1),
    Key("objective.beta", -1.0, "weight of the KL term", low=-1),
    Key("objective.kl", "", "estimator of the KL divergence", choices=("", "k1", "k2", "k3")),
    Key("objective.reduction", "", "how tokens are averaged", choices=("", "sequence_mean", "token_mean", "constant")),
    Key("objective.overlong", "", "what becomes of completions cut off", choices=("", "keep", "mask", "soft")),
    Key("objective.dynamic_sampling", "", "only prompts with different rewards", choices=("", "on", "off")),
    Key("objective.gap_bound", -1.0, "nats; a larger sampler-learner gap is corrected", low=-1),
    Key("objective.importance_cap", -1.0, "greatest weight of that correction", low=-1),
    Key("objective.iterations", 1, "updates on the same completions (mu)", low=1, high=1024),
    Key(
        "learner.completions_per_row",
        0,
        "completions of a prompt that share a row, divides rollout.completions; 0 = all. Fewer need less memory and "
        "can be split over more devices, but compute the prompt more often",
        low=0,
        free=True,
    ),
    Key("eval.path", "", "held-out prompts, a file of records or a TFDS set; '' = none", free=True, bucket=True),
    Key("eval.root", "", "their media folder; '' = data.root", free=True, bucket=True),
    Key("eval.every", 100, "steps between evaluations on them, from step 0 on", low=1, free=True),
    Key("eval.limit", 200, "at most this many of them", low=1, free=True),
    *take(TRAIN_KEYS, "accumulation", "trainable", "trace_steps", "watchdog_s", "resume", "loss_chunk"),
    *take(TRAIN_KEYS, "keep_checkpoints", steps=15000, log_every=1, checkpoint_every=100),
    Key(
        "train.keep_best",
        0,
        "checkpoints kept besides these for their reward in training, the mean of their ten newest steps",
        low=0,
        free=True,
    ),
    Key("train.completions_every", 1, "steps between those whose completions are logged; 0 = none", low=0, free=True),
)
