"""Keys of exporting what was trained."""

from __future__ import annotations

from configs.schema import Key
from configs.tables.shared import RUN_KEYS

EXPORT_KEYS = (
    Key("task", "export", "which task the config is for", choices=("export",)),
    *RUN_KEYS,
    Key("form", "peft", "a PEFT adapter, or the whole model with everything merged", choices=("peft", "merged")),
    Key("source", "", "what was trained: workdir or checkpoints folder of a run, or a PEFT adapter folder"),
    Key("step", -1, "step of the checkpoint; -1 = the newest", low=-1),
    Key("output", "", "folder to write; it must not exist yet"),
    Key("model.path", "", "Hugging Face folder of the base model; '' = where the run found it"),
    Key("base_name", "", "PEFT: name of the base model to put into adapter_config.json; '' = what is known of it"),
    Key(
        "dtype",
        "float32",
        "dtype in which the export is compared with the model; files keep theirs",
        choices=("float32", "bfloat16"),
    ),
    Key(
        "attention",
        "xla",
        "attention backend of that comparison",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    Key("tol.float32", 1e-4, "largest difference of the logits read back, as a share of the largest logit", low=0),
    Key("tol.bfloat16", 2e-2, "the same when the comparison is in bfloat16", low=0),
    Key(
        "tol.rounding",
        0.1,
        "merged into 16-bit files: largest difference of the logits from the model as it was trained, likewise",
        low=0,
    ),
)
