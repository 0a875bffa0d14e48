"""Keys of the tasks that run a model once: answering one question, and comparing numbers with a reference."""

from __future__ import annotations

from configs.schema import Key
from configs.tables.shared import RUN_KEYS, video_keys

INFER_KEYS = (
    Key("task", "infer", "which task the config is for", choices=("infer",)),
    *RUN_KEYS,
    Key("model", "", "Hugging Face folder of the model"),
    Key("video", "", "video file to ask about; '' = none"),
    Key("image", "", "image file to ask about; '' = none"),
    Key("question", "", "what to ask"),
    Key("system_file", "", "file with a system prompt; '' = none"),
    Key("max_new_tokens", 256, "longest answer, in tokens", low=1),
    Key("temperature", 0.0, "0 = greedy", low=0),
    Key("top_k", 0, "sample among this many best tokens; 0 = all", low=0),
    Key("top_p", 1.0, "sample among the smallest set of tokens with this probability", low=0),
    Key("dtype", "bfloat16", "dtype of weights and activations", choices=("bfloat16", "float32")),
    Key(
        "attention",
        "auto",
        "attention backend; 'auto' picks for the device",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    *video_keys("frames"),
)

VERIFY_KEYS = (
    Key("task", "verify", "which task the config is for", choices=("verify",)),
    *RUN_KEYS,
    Key("model", "", "Hugging Face folder of the model; '' = the model folders inside golden"),
    Key("golden", "", "recorded reference: one model's folder, a root of several, or a processor folder"),
    Key("case", "", "check only this case; '' = all"),
    Key(
        "position_rule",
        "auto",
        "Qwen2.5-VL temporal positions; 'auto' = what the recording says",
        choices=("auto", "release", "hf517", "hf523"),
    ),
    Key(
        "attention",
        "xla",
        "attention backend",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    Key("tol.patches", 1e-6, "largest absolute error of the pixel patches", low=0),
    Key("tol.vision", 2e-5, "largest absolute error of the vision tensors", low=0),
    Key("tol.hidden", 2e-4, "largest absolute error of the decoder's hidden states", low=0),
    Key("tol.logits", 1e-4, "largest absolute error of the logits", low=0),
    Key("tol.loss", 1e-5, "largest absolute error of the loss", low=0),
    Key("tol.grad_rel", 1e-3, "largest relative error of a gradient's norm", low=0),
)
