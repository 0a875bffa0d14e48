"""Score a model on a benchmark: tables with intervals, controls and comparisons.

python run.py --config=configs/eval.py --config.model.path=DIR --config.data.path=real_mc.json --config.data.root=VIDEOS
python run.py --config=configs/eval.py:rescore --config.rescore.path=FILE

Start it again with the same workdir after an interruption: it asks what is not answered yet.
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common
from configs.schema import check_variant

VARIANTS = MappingProxyType(
    {
        "": "VLM4D, direct answers, at most 32 frames of 224 x 224 pixels",
        "vlm4d": "the same",
        "mllm4d": "MLLM4D-Bench, or the held-out questions of a curation run",
        "jsonl": "questions of your own in a released record layout",
        "rescore": "scores predictions that are there already, published ones too; needs no model and no videos",
    }
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/eval.py")
    config = common.eval()
    if variant in ("mllm4d", "jsonl"):
        config.benchmark = variant
    return config
