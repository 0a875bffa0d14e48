"""The paper in miniature: from nothing to a model that reasons better about motion, and the table that shows it.

python run.py --config=configs/quickstart.py
python run.py --config=configs/quickstart.py:accelerator

Renders worlds, finds their geometry with the stereo stage, asks questions, fine-tunes a tiny model (`base`, made by
configs/pretrain_tiny.py), teaches it to reason, reinforces it without and with the spatio-temporal reward, and examines
every step on worlds that it has not seen. Each stage is a task that you can start yourself; its command is printed.
Started again with the same workdir, it goes on where it was stopped.
"""

from configs.schema import Presets
from configs.tables.quickstart import QUICKSTART_KEYS

get_config = Presets(
    "configs/quickstart.py",
    QUICKSTART_KEYS,
    {
        "": ("what two cores do in about a quarter of an hour", {}),
        "accelerator": ("more worlds and longer training, for a GPU or TPU", {"size": "accelerator"}),
        "smoke": ("shows in a few minutes that every stage runs; nothing is learned", {"size": "smoke"}),
    },
)
