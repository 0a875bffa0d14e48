"""Make training and held-out questions with computed answers from clips whose geometry is known.

python run.py --config=configs/curate.py:synthetic
python run.py --config=configs/curate.py:stereo4d --config.input=DIR
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
    }
)


def get_config(variant: str = "synthetic") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/curate.py")
    config = common.curate()
    config.source = variant
    return config
