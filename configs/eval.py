"""Score a model on a benchmark: tables with intervals, controls and comparisons.

python run.py --config=configs/eval.py --config.model.path=DIR --config.data.path=real_mc.json --config.data.root=VIDEOS
python run.py --config=configs/eval.py:rescore --config.rescore.path=FILE

Start it again with the same workdir after an interruption: it asks what is not answered yet.
"""

from configs.schema import Presets
from configs.tables.quickstart import EVAL, EVAL_REASONING
from configs.tables.use import EVAL_KEYS

get_config = Presets(
    "configs/eval.py",
    EVAL_KEYS,
    {
        "": ("VLM4D, direct answers, at most 32 frames of 224 x 224 pixels", {}),
        "vlm4d": ("the same", {}),
        "mllm4d": ("MLLM4D-Bench, or the held-out questions of a curation run", {"benchmark": "mllm4d"}),
        "jsonl": ("questions of your own in a released record layout", {"benchmark": "jsonl"}),
        "vsi": ("VSI-Bench, scored by its own rule", {"benchmark": "vsi", "extractor": "official"}),
        "sti": ("STI-Bench, scored by its own rule", {"benchmark": "sti", "extractor": "official"}),
        "dsr": ("DSR-Bench, scored by its own rule", {"benchmark": "dsr", "extractor": "official"}),
        "mmsi_video": (
            "MMSI-Video-Bench, scored by its own rule; answers may be longer",
            {"benchmark": "mmsi_video", "extractor": "official", "max_new_tokens": 1024},
        ),
        "quickstart": ("examination of configs/quickstart.py", EVAL),
        "quickstart_reasoning": ("the same, of models that write reasoning", EVAL_REASONING),
        "rescore": ("scores predictions that are there already, published ones too; needs no model and no videos", {}),
    },
)
