"""Write what a run has trained as a PEFT adapter or as a merged Hugging Face checkpoint; or a wider copy of a model.

python run.py --config=configs/export.py:peft --config.model.adapter=runs/sft --config.output=DIR
python run.py --config=configs/export.py:merged --config.model.adapter=runs/sft --config.output=DIR
python run.py --config=configs/export.py:wider --config.model.path=MODEL --config.output=DIR
"""

from configs.schema import Presets
from configs.tables.use import EXPORT_KEYS

get_config = Presets(
    "configs/export.py",
    EXPORT_KEYS,
    {
        "peft": ("adapter_config.json and adapter_model.safetensors, for PEFT and what reads its files", {}),
        "merged": (
            "the base model's files with adapters and trained weights merged in, for transformers and others",
            {"form": "merged"},
        ),
        "wider": (
            "a copy of a model with more heads and neurons that answers as the model does, to be trained further",
            {"form": "wider"},
        ),
    },
)
