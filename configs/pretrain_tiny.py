"""Pre-train the quickstart's tiny base on rendered clips: to see, to match options, both, and to follow told states.

python run.py --config=configs/curate.py:captions --workdir=runs/captions
python run.py --config=configs/pretrain_tiny.py:seeing --workdir=runs/seeing
python run.py --config=configs/export.py:merged --config.model.adapter=runs/seeing --config.output=runs/seeing/model
python run.py --config=configs/pretrain_tiny.py:matching --workdir=runs/matching
python run.py --config=configs/export.py:merged --config.model.adapter=runs/matching --config.output=runs/matching/model
python run.py --config=configs/pretrain_tiny.py:reading --workdir=runs/reading
python run.py --config=configs/export.py:merged --config.model.adapter=runs/reading --config.output=runs/reading/model
python run.py --config=configs/pretrain_tiny.py:looking --workdir=runs/looking
python run.py --config=configs/export.py:merged --config.model.adapter=runs/looking --config.output=runs/looking/model
python run.py --config=configs/pretrain_tiny.py --workdir=runs/telling
python run.py --config=configs/export.py:merged --config.model.adapter=runs/telling --config.output=runs/base
"""

from configs.schema import Presets
from configs.tables.quickstart_recipe import LOOKING_AGAIN, MATCHING, READING, SEEING, TELLING
from configs.tables.training import SFT_KEYS

get_config = Presets(
    "configs/pretrain_tiny.py",
    SFT_KEYS,
    {
        "seeing": ("from a random start, what is seen in the clips of runs/captions", SEEING),
        "matching": ("from the model of runs/seeing, which option a text belongs to", MATCHING),
        "reading": ("from the model of runs/matching, all short texts about the clips and beside them", READING),
        "looking": ("from the model of runs/reading, the same with more clips a step", LOOKING_AGAIN),
        "": ("from the model of runs/looking, what told states come to besides: a base for the quickstart", TELLING),
    },
)
