"""Compare a checkpoint's numbers, tensor by tensor, with a recorded reference.

python run.py --config=configs/verify.py --config.model.path=DIR --config.golden=DIR
"""

from configs.schema import Presets
from configs.tables.use import VERIFY_KEYS

get_config = Presets(
    "configs/verify.py", VERIFY_KEYS, {"": ("float32, every recorded case, the tolerances float32 allows", {})}
)
