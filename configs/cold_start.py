"""Cold start: the fine-tuned model learns to write its reasoning with spatial states (ST-CoT), before reinforcement.

python run.py --config=configs/cold_start.py:tiny
python run.py --config=configs/cold_start.py --config.model.path=DIR --config.data.path=F.jsonl --config.data.root=DIR

`model.adapter` names the workdir of the fine-tuning run to start from.
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common, sft
from configs.schema import check_variant

VARIANTS = MappingProxyType(
    {
        "": "the released script's settings: batch 32, one epoch of 7,000 records, from the adapter in runs/sft",
        "tiny": "goes on from configs/sft.py:tiny (runs/sft-tiny), on a CPU",
    }
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The locked config of a variant. The optimiser and the learning rate begin anew."""
    check_variant(variant, VARIANTS, "configs/cold_start.py")
    config = common.sft()
    if variant == "tiny":
        sft.tiny(config)
        config.data.sample = ""
        config.data.path = "runs/sft-tiny/sample/world/cold_start.json"
        config.data.root = "runs/sft-tiny/sample/world"
        config.model.path = "runs/sft-tiny/sample/model"
        config.data.questions_per_video = 4
        config.train.batch_size = 8
        config.train.steps = 300
    else:
        config.train.batch_size = 32  # 8 on each of 4 GPUs
        config.train.steps = 219  # one epoch of 7,000 records
        config.train.log_every = 5
        config.train.checkpoint_every = 50
    config.model.adapter = "runs/sft-tiny" if variant == "tiny" else "runs/sft"
    config.prompt.system = sft.TINY_PROMPT if variant == "tiny" else "st_cot"
    config.optim.warmup_ratio = 0.03
    return config
