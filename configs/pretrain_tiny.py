"""Pre-train the quickstart's tiny base on captions of rendered clips: from a random start to see, then to read.

python run.py --config=configs/curate.py:captions --workdir=runs/captions
python run.py --config=configs/pretrain_tiny.py:seeing --workdir=runs/seeing
python run.py --config=configs/export.py:merged --config.model.adapter=runs/seeing --config.output=runs/seeing/exported
python run.py --config=configs/pretrain_tiny.py --workdir=runs/reading
python run.py --config=configs/export.py:merged --config.model.adapter=runs/reading --config.output=runs/base
"""

from configs.schema import Presets
from configs.tables.quickstart_recipe import READING, SEEING
from configs.tables.training import SFT_KEYS

get_config = Presets(
    "configs/pretrain_tiny.py",
    SFT_KEYS,
    {
        "seeing": ("from a random start, what is seen in the clips of runs/captions", SEEING),
        "": ("from the model of runs/seeing, what is asked about them; a base for the quickstart", READING),
    },
)
