"""Ask a model about one video or image: a question, those of a file or record, or one typed after the other.

python run.py --config=configs/infer.py --config.model.path=DIR --config.clip=FILE --config.question="What moves?"
python run.py --config=configs/infer.py --config.model.adapter=RUN --config.clip=FILE --config.page=FILE
"""

from configs.schema import Presets
from configs.tables.use import INFER_KEYS

get_config = Presets("configs/infer.py", INFER_KEYS, {"": ("greedy answer, at most 32 frames of 224 x 224 pixels", {})})
