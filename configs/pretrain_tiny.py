"""Pre-train the quickstart's tiny base on captions of rendered clips: to see, to match, then both.

python run.py --config=configs/curate.py:captions --workdir=runs/captions
python run.py --config=configs/pretrain_tiny.py:seeing --workdir=runs/seeing
python run.py --config=configs/export.py:merged --config.model.adapter=runs/seeing --config.output=runs/seeing/model
python run.py --config=configs/pretrain_tiny.py:matching --workdir=runs/matching
python run.py --config=configs/export.py:merged --config.model.adapter=runs/matching --config.output=runs/matching/model
python run.py --config=configs/pretrain_tiny.py:reading --workdir=runs/reading
python run.py --config=configs/export.py:merged --config.model.adapter=runs/reading --config.output=runs/reading/model
python run.py --config=configs/pretrain_tiny.py --workdir=runs/looking
python run.py --config=configs/export.py:merged --config.model.adapter=runs/looking --config.output=runs/base
"""

from configs.schema import Presets
from configs.tables.quickstart_recipe import LOOKING_AGAIN, MATCHING, READING, SEEING
from configs.tables.training import SFT_KEYS

get_config = Presets(
    "configs/pretrain_tiny.py",
    SFT_KEYS,
    {
        "seeing": ("from a random start, what is seen in the clips of runs/captions", SEEING),
        "matching": ("from the model of runs/seeing, which option a text belongs to", MATCHING),
        "reading": ("from the model of runs/matching, all that is said and asked about the clips", READING),
        "": (
            "from the model of runs/reading, the same with more clips a step: a base for the quickstart",
            LOOKING_AGAIN,
        ),
    },
)
