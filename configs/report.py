"""The page of a run, or of two runs side by side: one HTML file that needs nothing beside itself.

python run.py --config=configs/report.py --config.run=runs/sft-tiny
python run.py --config=configs/report.py --config.run=runs/first --config.other=runs/second
"""

from configs.schema import Presets
from configs.tables.use import REPORT_KEYS

get_config = Presets("configs/report.py", REPORT_KEYS, {"": ("at most 200 answers, four frames of each clip", {})})
