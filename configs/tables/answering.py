"""Keys of the tasks that run a model once: answering one question, and comparing numbers with a reference."""

from configs.schema import Key
from configs.tables.shared import MESH_KEYS, MODEL_KEYS, VIDEO_KEYS, run_keys, take

INFER_KEYS = (
    *run_keys("infer"),
    *MODEL_KEYS,
    *take(MESH_KEYS, "tensor"),
    *VIDEO_KEYS,
    Key("clip", "", "video file to ask about; '' = none"),
    Key("image", "", "image file to ask about; '' = none"),
    Key("question", "", "what to ask"),
    Key("system_file", "", "file with a system prompt; '' = none"),
    Key("max_new_tokens", 256, "longest answer, in tokens", low=1),
    Key("temperature", 0.0, "0 = greedy", low=0),
    Key("top_k", 0, "sample among this many best tokens; 0 = all", low=0),
    Key("top_p", 1.0, "sample among the smallest set of tokens with this probability", low=0),
)

VERIFY_KEYS = (
    *run_keys("verify"),
    *take(MODEL_KEYS, "path", attention="xla"),
    Key("golden", "", "reference: a model's folder (perhaps with weights), a root of several, or a processor's folder"),
    Key("case", "", "check only this case; '' = all"),
    Key(
        "position_rule",
        "auto",
        "Qwen2.5-VL temporal positions; 'auto' = what the recording says",
        choices=("auto", "release", "hf517", "hf523"),
    ),
    Key("tol.patches", 1e-6, "largest absolute error of the pixel patches", low=0),
    Key("tol.vision", 2e-5, "largest absolute error of the vision tensors", low=0),
    Key("tol.hidden", 2e-4, "largest absolute error of the decoder's hidden states", low=0),
    Key("tol.logits", 1e-4, "largest absolute error of the logits", low=0),
    Key("tol.loss", 1e-5, "largest absolute error of the loss", low=0),
    Key("tol.grad_rel", 1e-3, "largest relative error of a gradient's norm", low=0),
)
