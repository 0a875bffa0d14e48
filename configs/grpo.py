"""Reinforcement learning with the spatio-temporal reward, from a cold-start adapter.

python run.py --config=configs/grpo.py:tiny
python run.py --config=configs/grpo.py --config.model.path=DIR --config.data.path=FILE.jsonl --config.data.root=DIR
"""

from configs.schema import Presets
from configs.tables.quickstart import GRPO_WITH_ST, GRPO_WITHOUT_ST
from configs.tables.reinforcement import GRPO_KEYS
from configs.tables.tiny import PROMPT, TINY

get_config = Presets(
    "configs/grpo.py",
    GRPO_KEYS,
    {
        "": ("the paper's settings (arXiv 2603.00515): 12 completions a prompt, lr 5e-5, KL weight 0.1", {}),
        "paper": ("the same by name", {}),
        "release": (
            "the released training script's: lr 1e-4, KL weight 0.001, the release's reward",
            {
                "optim.lr": 1e-4,
                "optim.warmup_ratio": 0.001,
                "objective.preset": "release",
                "reward.functions": ("release::1.0",),
            },
        ),
        "quickstart": ("reinforcement of configs/quickstart.py", GRPO_WITH_ST),
        "quickstart_without_st": ("the same without the spatio-temporal reward", GRPO_WITHOUT_ST),
        "tiny": (
            "goes on from configs/cold_start.py:tiny (runs/cold_start-tiny), on a CPU",
            {
                **TINY,
                "model.path": "runs/sft-tiny/sample/model",
                "model.adapter": "runs/cold_start-tiny",
                "data.path": "runs/sft-tiny/sample/world/r1.jsonl",
                "data.root": "runs/sft-tiny/sample/world",
                "data.prefix_buckets": (128, 192, 256, 384, 512),
                "prompt.system": PROMPT,
                "optim.lr": 1e-4,
                "rollout.prompts": 8,
                "rollout.completions": 8,
                "rollout.temperature": 0.8,  # the model is unsure of every token; at 1 it forgets what it has learned
                "rollout.max_new_tokens": 256,
                "rollout.buckets": (64, 128, 192, 256),
                "rollout.stop": ("</answer>",),
                "objective.beta": 0.01,
                "eval.path": "runs/sft-tiny/sample/world/r1.jsonl",
                "eval.every": 20,
                "eval.limit": 12,
                "train.steps": 40,
                "train.checkpoint_every": 20,
            },
        ),
    },
)
