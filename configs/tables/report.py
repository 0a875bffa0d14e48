"""Keys of the task that makes the page of a run."""

from configs.schema import Key
from configs.tables.shared import run_keys

REPORT_KEYS = (
    *run_keys("report"),
    Key("run", "", "workdir of the run to show"),
    Key("other", "", "workdir of a run to compare it with; '' = none"),
    Key("out", "", "file to write; '' = report.html in the run, for two runs in this task's own workdir"),
    Key("answers", 200, "completions and predictions shown at most; more are sampled evenly", low=1),
    Key("frames", 4, "frames shown of a clip; 0 = none, and no video is opened", low=0),
    Key("clip_s", 20.0, "seconds a clip may take to decode", low=0),
    Key("pictures_s", 120.0, "seconds after which no further clip is decoded", low=0),
)
