"""Keys of the evaluation on a benchmark."""

from __future__ import annotations

from configs.schema import Key
from configs.tables.shared import RUN_KEYS, video_keys
from configs.tables.training import SFT_KEYS

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
    Key("data.workers", 2, "videos that are decoded and encoded at a time while the model answers others", low=1),
    Key("data.max_tokens", 8192, "a question with more tokens than this is quarantined, never cut", low=16),
    *(key for key in SFT_KEYS if key.name in ("data.prefix_buckets", "data.branch_buckets")),
    Key("model.path", "", "Hugging Face folder of the model"),
    Key("model.adapter", "", "adapter on top of it: workdir or checkpoints folder of a run, or a PEFT folder"),
    Key("model.step", -1, "checkpoint of that run by its step; -1 = the newest", low=-1),
    Key("model.dtype", "bfloat16", "dtype of weights and activations", choices=("bfloat16", "float32")),
    Key(
        "model.attention",
        "auto",
        "attention backend; 'auto' picks for the device",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    Key("mesh.data", -1, "devices of a process along the data axis; -1 = all that are left", low=-1),
    Key("mesh.tensor", 1, "devices of a process that share the weights; -1 = all that are left", low=-1),
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
    Key("prompts_at_once", 8, "videos in the model at a time, which bounds the memory of prefill and caches", low=1),
    Key("chunk", 32, "tokens between two looks at which responses have ended", low=1),
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
