"""Keys of the tasks that use what was trained: one answer, evaluation, export, check against numbers, and the page."""

from configs.schema import Key
from configs.tables.shared import MESH_KEYS, MODEL_KEYS, VIDEO_KEYS, run_keys, take
from configs.tables.training import DATA_KEYS

PROMPT_KEYS = (
    Key(
        "prompt.mode",
        "direct",
        "ask for the letter, ask for spatio-temporal reasoning first, or use the system prompt in prompt.file",
        choices=("direct", "st_cot", "file"),
    ),
    Key("prompt.file", "", "file with a system prompt, for prompt.mode=file", content=True, bucket=True),
)
INFER_KEYS = (
    *run_keys("infer"),
    *MODEL_KEYS,
    *take(MESH_KEYS, "tensor"),
    *VIDEO_KEYS,
    Key("clip", "", "video file to ask about; '' = none", bucket=True),
    Key("image", "", "image file to ask about; '' = none", bucket=True),
    Key(
        "record",
        "",
        "FILE:KEY, questions that a record file has, with their clip: KEY is a record's number (from 0) or id, or a "
        "video's path as the file has it for all questions about it",
        bucket=True,
    ),
    Key("data.root", "", "folder that the record's paths are relative to; '' = the folder of its file", bucket=True),
    Key("question", "", "what to ask; options go behind it: 'Which way? | left | right'"),
    Key(
        "questions",
        "",
        "text file with a question on each line; without question, questions and record they are read from the "
        "terminal or standard input",
    ),
    *PROMPT_KEYS,
    Key("page", "", "HTML file to write: frames, answers, reasoning and maps; '' = none", bucket=True),
    Key("max_new_tokens", 256, "longest answer, in tokens", low=1, high=1 << 20),
    Key("temperature", 0.0, "0 = greedy", low=0, high=100),
    Key("top_k", 0, "sample among this many best tokens; 0 = all", low=0),
    Key("top_p", 1.0, "sample among the smallest set of tokens with this probability", high=1, above=0),
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
        ("auto", "release", "hf517", "hf523"),
    ),
    # Shares of a tensor's own size; more where rounding alone makes more, see mllm4d_jax/verify/checks.py.
    Key("tol.patches", 1e-6, "largest error of the pixel patches, absolute", low=0),
    Key("tol.vision", 2e-5, "largest error of a vision tensor, as a share of its row's root mean square", low=0),
    Key("tol.hidden", 5e-5, "largest error of the decoder's hidden states, as a share likewise", low=0),
    Key("tol.logits", 5e-5, "largest error of the logits, as a share likewise", low=0),
    Key("tol.loss", 5e-6, "largest error of the loss, as a share of it", low=0),
    Key("tol.grad_rel", 1e-3, "largest error of a gradient's norm, as a share of it", low=0),
)

EVAL_KEYS = (
    *run_keys("eval"),
    Key(
        "benchmark",
        "vlm4d",
        "layout of the questions: VLM4D's lists, MLLM4D-Bench (also as curation writes it), any questions in a "
        "released record layout, VSI-Bench, STI-Bench, DSR-Bench, MMSI-Video-Bench",
        choices=("vlm4d", "mllm4d", "jsonl", "vsi", "sti", "dsr", "mmsi_video"),
    ),
    Key(
        "data.path",
        "",
        "file with the questions, or a folder of .json, .jsonl, .parquet and .tsv files",
        content=True,
        bucket=True,
    ),
    Key("data.root", "", "folder that the questions' video paths are relative to", content=True, bucket=True),
    Key(
        "data.max_tokens", 8192, "a question with more tokens than this is quarantined, never cut", low=16, high=1 << 20
    ),
    *take(DATA_KEYS, "workers", "prefix_buckets", "branch_buckets"),
    *MODEL_KEYS,
    *take(MESH_KEYS, "data", "tensor"),
    *VIDEO_KEYS,
    *PROMPT_KEYS,
    Key("prompt.gen_prefix", "", "text that begins every response, e.g. '<answer>'; the model goes on from there"),
    Key("max_new_tokens", 64, "longest response, in tokens", low=1, high=1 << 20),
    Key("temperature", 0.0, "0 = greedy", low=0, high=100),
    Key(
        "questions_per_video",
        8,
        "questions about a video asked together, over one shared prefix",
        low=1,
        high=4096,
        free=True,
    ),
    Key(
        "prompts_at_once",
        8,
        "videos in the model at a time (memory of prefill and caches)",
        low=1,
        high=1 << 20,
        free=True,
    ),
    Key("chunk", 32, "tokens between two looks at which responses have ended", low=1, high=1 << 20, free=True),
    Key("limit", 0, "ask only this many questions; 0 = all", low=0, free=True),
    Key("control", "", "without the video, or its frames in random order; '' = as usual", ("", "blind", "shuffled")),
    Key(
        "rescore.path",
        "",
        "score these instead of asking: predictions.jsonl, a workdir, or published files",
        free=True,
        bucket=True,
    ),
    Key(
        "extractor",
        "strict",
        "read answers by our rules, or as the release or the benchmark's own program does",
        ("strict", "official"),
        free=True,
    ),
    Key("controls", (), "predictions of control runs on the same questions, shown beside", free=True, element=str),
    Key(
        "compare",
        "",
        "predictions of another run on the same questions, to compare with; '' = none",
        free=True,
        bucket=True,
    ),
    Key("bootstrap.samples", 10000, "draws for the intervals", low=100, high=1000000, free=True),
)

EXPORT_KEYS = (
    *run_keys("export"),
    Key(
        "form",
        "peft",
        "a PEFT adapter, the whole model with everything merged, or a wider copy of a model",
        choices=("peft", "merged", "wider"),
    ),
    Key("output", "", "folder to write; it must not exist yet", bucket=True),
    # dtype and attention are those of the comparison with the model; the files keep their own dtype.
    *take(MODEL_KEYS, "path", "adapter", "step", dtype="float32", attention="xla"),
    Key("factor", 2, "wider: how many times as many inner neurons, and heads of queries (Qwen3-VL)", low=2, high=64),
    Key("base_name", "", "PEFT: name of the base model to put into adapter_config.json; '' = what is known of it"),
    Key("tol.float32", 1e-4, "largest difference of the logits read back, as a share of the largest logit", low=0),
    Key("tol.bfloat16", 2e-2, "the same when the comparison is in bfloat16", low=0),
    Key("tol.rounding", 0.1, "merged into 16-bit files: the same against the model as it was trained", low=0),
)

REPORT_KEYS = (
    *run_keys("report"),
    Key("run", "", "workdir of the run to show", bucket=True),
    Key("other", "", "workdir of a run to compare it with; '' = none", bucket=True),
    Key("out", "", "file to write; '' = report.html in the run, for two runs in this task's own workdir", bucket=True),
    Key("answers", 200, "completions and predictions shown at most; more are sampled evenly", low=1),
    Key("frames", 4, "frames shown of a clip; 0 = none, and no video is opened", low=0, high=4096),
    Key("clip_s", 20.0, "seconds a clip may take to decode", low=0),
    Key("pictures_s", 120.0, "seconds after which no further clip is decoded", low=0),
)
