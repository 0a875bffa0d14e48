"""Make training and held-out questions with computed answers from clips whose geometry is known or can be found.

python run.py --config=configs/curate.py:synthetic
python run.py --config=configs/curate.py:stereo4d --config.input=DIR
python run.py --config=configs/curate.py:stereo --config.input=DIR
python run.py --config=configs/curate.py:monocular --config.input=DIR
python run.py --config=configs/curate.py:captions
python run.py --config=configs/curate.py:describe --config.input=DIR --config.teacher.model=NAME
python run.py --config=configs/curate.py:cold_start --config.cold_start.records=FILE.jsonl
"""

from configs.schema import Presets
from configs.tables.curation import CURATE_KEYS
from configs.tables.quickstart import BENCH, QUESTIONS, REASONING, WORLDS
from configs.tables.quickstart_recipe import PRETRAINING_CLIPS

get_config = Presets(
    "configs/curate.py",
    CURATE_KEYS,
    {
        "synthetic": ("renders rooms with moving objects and a moving camera; nothing is needed", {}),
        "stereo4d": (
            "reads Stereo4D annotations with their rectified videos, masks and captions",
            {"source": "stereo4d"},
        ),
        "stereo": ("finds depth, camera path and object points from stereo videos alone", {"source": "stereo"}),
        "monocular": ("reads SpatialTrackerV2 tracks and MoGe-2 depth", {"source": "monocular"}),
        "describe": (
            "has a vision language model name what moves, and describe segmented objects",
            {"source": "describe", "teacher.kind": "endpoint"},
        ),
        "captions": (
            "renders clips with captions in words, and text to match, for pre-training the tiny base model",
            {**PRETRAINING_CLIPS, "source": "captions"},
        ),
        "cold_start": (
            "writes reasoning (ST-CoT) for questions that are there already, and keeps the best of it",
            {"source": "cold_start"},
        ),
        "quickstart": ("configs/quickstart.py: finds the geometry of its worlds and asks about it", QUESTIONS),
        "quickstart_worlds": ("configs/quickstart.py: renders worlds for two eyes", WORLDS),
        "quickstart_bench": ("configs/quickstart.py: renders worlds to be examined on", BENCH),
        "quickstart_reasoning": ("configs/quickstart.py: writes reasoning", REASONING),
    },
)
