"""Cold start: the fine-tuned model learns to write its reasoning with spatial states (ST-CoT), before reinforcement.

python run.py --config=configs/cold_start.py:tiny
python run.py --config=configs/cold_start.py --config.model.path=DIR --config.data.path=F.jsonl --config.data.root=DIR

`model.adapter` names the workdir of the fine-tuning run to start from; the optimiser and the learning rate begin anew.
"""

from configs.schema import Presets
from configs.tables.quickstart_recipe import COLD_START
from configs.tables.tiny import PROMPT, TINY_SFT
from configs.tables.training import SFT_KEYS

get_config = Presets(
    "configs/cold_start.py",
    SFT_KEYS,
    {
        "": (
            "the released script's settings: batch 32 (8 on each of 4 GPUs), one epoch of 7,000 records, from the "
            "adapter in runs/sft",
            {
                "model.adapter": "runs/sft",
                "prompt.system": "st_cot",
                "optim.warmup_ratio": 0.03,
                "train.batch_size": 32,
                "train.steps": 219,
                "train.log_every": 5,
                "train.checkpoint_every": 50,
            },
        ),
        "quickstart": ("cold start of configs/quickstart.py", COLD_START),
        "tiny": (
            "goes on from configs/sft.py:tiny (runs/sft-tiny), on a CPU",
            {
                **TINY_SFT,
                "data.path": "runs/sft-tiny/sample/world/cold_start.json",
                "data.root": "runs/sft-tiny/sample/world",
                "data.questions_per_video": 4,
                "model.path": "runs/sft-tiny/sample/model",
                "model.adapter": "runs/sft-tiny",
                "prompt.system": PROMPT,
                "optim.warmup_ratio": 0.03,
                "train.batch_size": 8,
            },
        ),
    },
)
