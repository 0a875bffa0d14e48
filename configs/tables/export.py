"""Keys of exporting what was trained."""

from configs.schema import Key
from configs.tables.shared import MODEL_KEYS, run_keys, take

EXPORT_KEYS = (
    *run_keys("export"),
    Key("form", "peft", "a PEFT adapter, or the whole model with everything merged", choices=("peft", "merged")),
    Key("output", "", "folder to write; it must not exist yet"),
    # dtype and attention are those of the comparison with the model; the files keep their own dtype.
    *take(MODEL_KEYS, "path", "adapter", "step", dtype="float32", attention="xla"),
    Key("base_name", "", "PEFT: name of the base model to put into adapter_config.json; '' = what is known of it"),
    Key("tol.float32", 1e-4, "largest difference of the logits read back, as a share of the largest logit", low=0),
    Key("tol.bfloat16", 2e-2, "the same when the comparison is in bfloat16", low=0),
    Key("tol.rounding", 0.1, "merged into 16-bit files: the same against the model as it was trained", low=0),
)
