"""Keys of the evaluation on a benchmark."""

from configs.schema import Key
from configs.tables.shared import MESH_KEYS, MODEL_KEYS, VIDEO_KEYS, run_keys, take
from configs.tables.training import DATA_KEYS

EVAL_KEYS = (
    *run_keys("eval"),
    Key(
        "benchmark",
        "vlm4d",
        "layout of the questions: VLM4D's lists, MLLM4D-Bench (also as curation writes it), or any questions in a "
        "released record layout",
        choices=("vlm4d", "mllm4d", "jsonl"),
    ),
    Key("data.path", "", "file with the questions, or a folder of .json and .jsonl files", content=True),
    Key("data.root", "", "folder that the questions' video paths are relative to", content=True),
    Key("data.max_tokens", 8192, "a question with more tokens than this is quarantined, never cut", low=16, free=True),
    *take(DATA_KEYS, "workers", "prefix_buckets", "branch_buckets"),
    *MODEL_KEYS,
    *take(MESH_KEYS, "data", "tensor"),
    *VIDEO_KEYS,
    Key(
        "prompt.mode",
        "direct",
        "ask for the letter, ask for spatio-temporal reasoning first, or use the system prompt in prompt.file",
        choices=("direct", "st_cot", "file"),
    ),
    Key("prompt.file", "", "file with a system prompt, for prompt.mode=file", content=True),
    Key("max_new_tokens", 64, "longest response, in tokens", low=1),
    Key("temperature", 0.0, "0 = greedy", low=0),
    Key("questions_per_video", 8, "questions about a video asked together, over one shared prefix", low=1, free=True),
    Key("prompts_at_once", 8, "videos in the model at a time (memory of prefill and caches)", low=1, free=True),
    Key("chunk", 32, "tokens between two looks at which responses have ended", low=1, free=True),
    Key("limit", 0, "ask only this many questions; 0 = all", low=0, free=True),
    Key(
        "control",
        "",
        "without the video, or its frames in random order; '' = as usual",
        choices=("", "blind", "shuffled"),
    ),
    Key(
        "rescore.path", "", "score these instead of asking: predictions.jsonl, a workdir, or published files", free=True
    ),
    Key(
        "extractor", "strict", "read answers by our rules, or the release's", choices=("strict", "official"), free=True
    ),
    Key("controls", (), "predictions of control runs on the same questions, shown beside", free=True),
    Key("compare", "", "predictions of another run on the same questions, to compare with; '' = none", free=True),
    Key("bootstrap.samples", 10000, "draws for the intervals", low=100, free=True),
)
