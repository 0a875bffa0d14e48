"""Answer a question about one video or image with a checkpoint.

python run.py --config=configs/infer.py --config.model=DIR --config.video=FILE --config.question="What moves?"
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common
from configs.schema import check_variant

VARIANTS = MappingProxyType({"": "greedy answer, at most 32 frames of 224 x 224 pixels"})


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/infer.py")
    return common.infer()
