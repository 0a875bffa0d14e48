"""Compare a checkpoint's numbers, tensor by tensor, with a recorded reference.

python run.py --config=configs/verify.py --config.model=DIR --config.golden=DIR
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common
from configs.schema import check_variant

VARIANTS = MappingProxyType({"": "float32, every recorded case, the tolerances float32 allows"})


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/verify.py")
    return common.verify()
