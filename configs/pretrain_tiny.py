"""Pre-train the tiny base of the quickstart on rendered clips: letters, sums, where things are, all.

python run.py --config=configs/curate.py:captions --workdir=runs/captions
python run.py --config=configs/pretrain_tiny.py:letters --workdir=runs/letters
python run.py --config=configs/export.py:merged --config.model.adapter=runs/letters --config.output=runs/letters/model
python run.py --config=configs/pretrain_tiny.py:matching --workdir=runs/matching
python run.py --config=configs/export.py:merged --config.model.adapter=runs/matching --config.output=runs/matching/model
python run.py --config=configs/pretrain_tiny.py:placing --workdir=runs/placing
python run.py --config=configs/export.py:merged --config.model.adapter=runs/placing --config.output=runs/placing/model
python run.py --config=configs/pretrain_tiny.py --workdir=runs/last
python run.py --config=configs/export.py:merged --config.model.adapter=runs/last --config.output=runs/base
"""

from configs.schema import Presets
from configs.tables.quickstart_recipe import ASKING, LETTERS, MATCHING, PLACING
from configs.tables.training import SFT_KEYS

get_config = Presets(
    "configs/pretrain_tiny.py",
    SFT_KEYS,
    {
        "letters": ("from a random start and without clips, which option a text belongs to", LETTERS),
        "matching": ("from the model of runs/letters, the same beside clips, and what states come to", MATCHING),
        "placing": ("from the model of runs/matching, where things are, in camera heights and in words", PLACING),
        "": (
            "from the model of runs/placing, all that, and what questions are about: a base for the quickstart",
            ASKING,
        ),
    },
)
