"""Keys of the evaluation on a benchmark."""

from __future__ import annotations

from configs.schema import Key
from configs.tables.shared import RUN_KEYS, video_keys

EVAL_KEYS = (
    Key("task", "eval", "which task the config is for", choices=("eval",)),
    *RUN_KEYS,
    Key(
        "benchmark",
        "vlm4d",
        "layout of the questions: VLM4D's lists, MLLM4D-Bench (also as curation writes it), or any questions in a "
        "released record layout",
        choices=("vlm4d", "mllm4d", "jsonl"),
    ),
    Key("data.path", "", "file with the questions, or a folder whose .json and .jsonl files are all taken"),
    Key("data.root", "", "folder that the questions' video paths are relative to"),
    Key("data.workers", 0, "processes that decode and encode; 0 = in the main process", low=0),
    Key("model.path", "", "Hugging Face folder of the model"),
    Key("model.adapter", "", "adapter on top of it: workdir or checkpoints folder of a run, or a PEFT folder"),
    Key("model.dtype", "bfloat16", "dtype of weights and activations", choices=("bfloat16", "float32")),
    Key(
        "model.attention",
        "auto",
        "attention backend; 'auto' picks for the device",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    Key("mesh.data", -1, "devices along the data axis; -1 = all that are left", low=-1),
    Key("mesh.fsdp", 1, "devices along the axis that shards parameters; -1 = all that are left", low=-1),
    Key("mesh.tensor", 1, "devices along the tensor-parallel axis; -1 = all that are left", low=-1),
    *video_keys("video"),
    Key(
        "prompt.mode",
        "direct",
        "ask for the letter, ask for spatio-temporal reasoning first, or use the system prompt in prompt.file",
        choices=("direct", "st_cot", "file"),
    ),
    Key("prompt.file", "", "file with a system prompt, for prompt.mode=file"),
    Key("max_new_tokens", 64, "longest response, in tokens", low=1),
    Key("temperature", 0.0, "0 = greedy", low=0),
    Key(
        "questions_per_video", 8, "most questions about a video that are asked together, over one shared prefix", low=1
    ),
    Key("limit", 0, "ask only this many questions; 0 = all", low=0),
    Key(
        "control",
        "",
        "a control run: without the video, or with its frames in random order; '' = an ordinary run",
        choices=("", "blind", "shuffled"),
    ),
    Key("rescore.path", "", "score these instead of asking a model: predictions.jsonl, a workdir, or published files"),
    Key(
        "extractor",
        "strict",
        "how answers are read: by this project's rules, or as the release does as far as that is known",
        choices=("strict", "official"),
    ),
    Key("controls", (), "predictions of control runs on the same questions, shown beside"),
    Key("compare", "", "predictions of another run on the same questions, to compare with; '' = none"),
    Key("bootstrap.samples", 10000, "draws for the intervals", low=100),
)
