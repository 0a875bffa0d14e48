"""Write what a run has trained as a PEFT adapter or as a merged Hugging Face checkpoint.

python run.py --config=configs/export.py:peft --config.source=runs/sft --config.output=DIR
python run.py --config=configs/export.py:merged --config.source=runs/sft --config.output=DIR
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs import common
from configs.schema import check_variant

VARIANTS = MappingProxyType(
    {
        "peft": "adapter_config.json and adapter_model.safetensors, for PEFT and what reads its files",
        "merged": "the base model's files with adapters and trained weights merged in, for transformers and others",
    }
)


def get_config(variant: str = "peft") -> ml_collections.ConfigDict:
    """The locked config of a variant."""
    check_variant(variant, VARIANTS, "configs/export.py")
    config = common.export()
    config.form = variant
    return config
