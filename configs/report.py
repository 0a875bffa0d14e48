"""The page of a run, or of two runs side by side: one HTML file that needs nothing beside itself.

python run.py --config=configs/report.py --config.run=runs/sft-tiny
python run.py --config=configs/report.py --config.run=runs/first --config.other=runs/second
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common
from configs.schema import check_variant

VARIANTS = MappingProxyType({"": "at most 200 answers, four frames of each clip"})


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/report.py")
    return common.report()
