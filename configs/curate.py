"""Make training and held-out questions with computed answers from clips whose geometry is known or can be found.

python run.py --config=configs/curate.py:synthetic
python run.py --config=configs/curate.py:stereo4d --config.input=DIR
python run.py --config=configs/curate.py:stereo --config.input=DIR
python run.py --config=configs/curate.py:monocular --config.input=DIR
python run.py --config=configs/curate.py:describe --config.input=DIR --config.teacher.model=NAME
python run.py --config=configs/curate.py:cold_start --config.cold_start.records=FILE.jsonl
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common
from configs.schema import check_variant

VARIANTS = MappingProxyType(
    {
        "synthetic": "renders rooms with moving objects and a moving camera; nothing is needed",
        "stereo4d": "reads Stereo4D annotations with their rectified videos, masks and captions",
        "stereo": "finds depth, camera path and object points from stereo videos alone",
        "monocular": "reads SpatialTrackerV2 tracks and MoGe-2 depth",
        "describe": "has a vision language model name what moves, and describe segmented objects",
        "cold_start": "writes reasoning (ST-CoT) for questions that are there already, and keeps the best of it",
    }
)


def get_config(variant: str = "synthetic") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/curate.py")
    config = common.curate()
    config.source = variant
    if variant == "describe":
        config.teacher.kind = "endpoint"
    return config
