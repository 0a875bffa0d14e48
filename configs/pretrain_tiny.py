"""Pre-train the quickstart's tiny base: to match options, to say what is in rendered clips, to follow told states.

python run.py --config=configs/curate.py:captions --workdir=runs/captions
python run.py --config=configs/pretrain_tiny.py:matching --workdir=runs/matching
python run.py --config=configs/export.py:merged --config.model.adapter=runs/matching --config.output=runs/matching/model
python run.py --config=configs/pretrain_tiny.py:seeing --workdir=runs/seeing
python run.py --config=configs/export.py:merged --config.model.adapter=runs/seeing --config.output=runs/seeing/model
python run.py --config=configs/pretrain_tiny.py --workdir=runs/telling
python run.py --config=configs/export.py:merged --config.model.adapter=runs/telling --config.output=runs/base
"""

from configs.schema import Presets
from configs.tables.quickstart_recipe import MATCHING, SEEING, TELLING
from configs.tables.training import SFT_KEYS

get_config = Presets(
    "configs/pretrain_tiny.py",
    SFT_KEYS,
    {
        "matching": ("from a random start, which option a text belongs to", MATCHING),
        "seeing": ("from the model of runs/matching, what is seen in the clips of runs/captions", SEEING),
        "": ("from the model of runs/seeing, the same and what told states come to: the quickstart's base", TELLING),
    },
)
