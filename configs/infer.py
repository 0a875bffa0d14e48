"""Answer a question about one video or image with a checkpoint.

python run.py --config=configs/infer.py --config.model.path=DIR --config.clip=FILE --config.question="What moves?"
"""

from configs.schema import Presets
from configs.tables.use import INFER_KEYS

get_config = Presets("configs/infer.py", INFER_KEYS, {"": ("greedy answer, at most 32 frames of 224 x 224 pixels", {})})
