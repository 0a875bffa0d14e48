"""Pre-train the quickstart's tiny base model, from a random start, on captions of rendered clips.

python run.py --config=configs/curate.py:captions --workdir=runs/captions
python run.py --config=configs/pretrain_tiny.py
python run.py --config=configs/export.py:merged --config.model.adapter=runs/pretrain_tiny --config.output=runs/base
"""

from configs.schema import Presets
from configs.tables.quickstart_recipe import PRETRAINING
from configs.tables.training import SFT_KEYS

get_config = Presets(
    "configs/pretrain_tiny.py",
    SFT_KEYS,
    {"": ("a base for the quickstart, from the captions in runs/captions", PRETRAINING)},
)
