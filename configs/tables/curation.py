"""Keys of making questions from clips."""

from configs.schema import Key
from configs.tables.shared import run_keys

# Questions about clips and reasoning for questions are two kinds of runs: each has to keep its own keys to go on.
CLIP_KEYS = (
    *run_keys("curate"),
    Key(
        "source",
        "synthetic",
        "where clips come from: rendered rooms with exact truth, Stereo4D annotations, stereo videos alone, "
        "SpatialTrackerV2 + MoGe-2. 'cold_start' writes reasoning for questions that are there already, 'describe' "
        "names objects for the other sources, 'captions' renders clips with captions to pre-train a small model on",
        choices=("synthetic", "stereo4d", "stereo", "monocular", "cold_start", "describe", "captions"),
    ),
    Key(
        "input",
        "",
        "all but synthetic: folder with the clips' files; what is expected there is in docs/data/curation.md",
        bucket=True,
    ),
    Key("decode_timeout_s", 60.0, "seconds a clip may take to decode", low=0, free=True),
    Key("synthetic.clips", 400, "synthetic: clips to render", low=1),
    Key("synthetic.height", 64, "synthetic: pixels", low=16, high=8192),
    Key("synthetic.width", 64, "synthetic: pixels", low=16, high=8192),
    Key("synthetic.frames", 16, "synthetic: frames per clip", low=2, high=10000),
    Key("synthetic.fps", 8.0, "synthetic: frames per second", low=0.1, high=1000),
    Key("synthetic.objects", (2, 4), "synthetic: fewest and most named objects of a clip", low=1, high=11),
    Key("synthetic.object_size", 1.0, "synthetic: factor on the sizes of objects", low=0.1, high=4),
    Key("synthetic.size_spread", 1.0, "synthetic: how unequal objects of a kind are in size", low=0, high=1),
    Key("synthetic.object_travel", (0.3, 2.4), "synthetic: least and most over a clip, metres", low=0.01, high=100),
    Key("synthetic.tumble", 1.0, "synthetic: how far moving objects turn; 0: they slide", low=0, high=1),
    Key("synthetic.plain", False, "synthetic: objects of one colour with dots, plaster walls, a checkered floor"),
    Key("synthetic.camera_travel", (0.2, 1.6), "synthetic: least and most over a clip, metres", low=0.01, high=100),
    Key("synthetic.camera_height", (1.2, 1.75), "synthetic: least and most, metres above the floor", low=0.7, high=1.9),
    Key(
        "synthetic.camera_tilt", (8.0, 20.0), "synthetic: least and most a camera looks down, degrees", low=-60, high=60
    ),
    Key("synthetic.turn", 20.0, "synthetic: most a camera yaws over a clip, degrees", low=0, high=180),
    Key("synthetic.stereo", False, "synthetic: render and write the right eye too"),
    Key("synthetic.baseline", 0.063, "synthetic: metres between the eyes", low=0.001, high=100),
    Key("synthetic.fov", 60.0, "synthetic: horizontal field of view", low=10, high=120),
    Key("stereo4d.frames", "video", "left frames: a video, or a folder of images", choices=("video", "images")),
    Key(
        "stereo.layout",
        "pair",
        "stereo: two videos per clip, or one that packs both views",
        choices=("pair", "left_right", "right_left", "top_bottom", "bottom_top"),
    ),
    Key(
        "stereo.fov_degrees",
        60.0,
        "stereo: horizontal field of view of one eye, unless <clip>-clip.json says",
        low=1,
        high=179,
    ),
    Key("stereo.baseline", 0.0, "stereo: metres between the eyes; 0 = assume 0.063, as Stereo4D does", low=0, high=100),
    Key("stereo.max_frames", 300, "stereo: a longer clip is rejected", low=2, high=100000),
    Key(
        "stereo.max_disparity",
        0,
        "stereo: pixels searched; 0 = an eighth of the width, or as many as a view needs",
        low=0,
        high=8192,
    ),
    Key("stereo.max_depth", 20.0, "stereo: metres; farther pixels count as unknown", low=0.1, high=10000),
    Key("monocular.max_spread", 0.1, "monocular: relative spread of the scale up to which it counts as metric", low=0),
    Key(
        "questions.num_frames", 32, "frames of a clip that the model will see; questions count these", low=2, high=65536
    ),
    Key("questions.per_clip", 28, "most questions proposed per clip, before balancing", low=1, high=100000),
    Key(
        "questions.kinds",
        (),
        "scenarios to ask about, each 'name' or 'name=weight'; () = all seven, equally often. Weights multiply the "
        "preset's shares of the training set; the held-out set has equal shares of those named",
        element=str,
    ),
    Key("questions.pairs", 24, "frame pairs tried per clip; more find more of what is scarce", low=1, high=100000),
    Key("questions.min_gap", 0.1, "both frames are at least this share of the clip apart", low=0, high=0.99),
    Key(
        "questions.points",
        "both",
        "points whose mean an object's place is: those that both frames show, or all that each shows, as the paper's "
        "formula reads; more is asked then, of objects that turn, and less exactly",
        choices=("both", "all"),
    ),
    Key("questions.min_points", 5, "points of an object that both frames must show", low=1, high=100000),
    Key("questions.min_motion", 0.2, "metres the camera must move to have a direction", low=0.001, high=1000),
    Key(
        "questions.dominance",
        1.5,
        "its largest component must be this many times the second; the lower, the more oblique a 'forward' may be",
        low=1,
        high=1000,
    ),
    Key("questions.tau", 0.25, "metres; a smaller change of an object is 'not moving'", low=0.001, high=1000),
    Key("questions.margin", 0.1, "metres around tau where nothing is asked; below tau", low=0, high=1000),
    Key(
        "questions.spacing",
        (),
        "ratios of neighbouring options of distances, each 'scenario=ratio', such as 1.6 for readers that only measure "
        "roughly; others are as wide as the paper's bounds (25 to 175 % of the truth) allow, about 1.2",
        element=str,
    ),
    Key(
        "questions.draws",
        1,
        "how often the same distance may be asked about, with options drawn anew: more to train on where clips are few",
        low=1,
        high=1000,
    ),
    Key(
        "questions.answers",
        "letter",
        "what train.json has for an answer: the letter, or first what was measured (metres, or the direction), or "
        "before that camera and object centre at both frames ('states'), in thinking and answer tags",
        choices=("letter", "measured", "states"),
    ),
    Key(
        "preset",
        "mllm4d_2m",
        "shares, caps and motion of the training set; 'all' = every question, unbalanced (for a handful of clips)",
        choices=("mllm4d_2m", "r1_30k", "all"),
        free=True,
    ),
    Key(
        "balance.slack",
        0.03,
        "accuracy above chance that a guesser without the video may reach on the training set, in every scenario; 0 = "
        "equal classes, as in the held-out set, which keeps far less where one answer is frequent",
        low=0,
        high=1,
        free=True,
    ),
    Key(
        "balance.stretch",
        3.0,
        "a scenario may have up to this many times its share of the training set where others have too few; 1 = "
        "exact shares",
        low=1,
        high=1000,
        free=True,
    ),
    Key("total", 0, "questions of the training set; 0 = as many as the shares allow", low=0, free=True),
    Key("bench_total", 0, "questions of the held-out set; 0 = as many as the shares allow", low=0, free=True),
    Key(
        "forms",
        (),
        "other forms of every clip that are asked about, too: 'mirrored', 'backwards', 'mirrored_backwards'. Only with "
        "bench_share = 0, so that nothing else than recordings is examined on",
        element=str,
    ),
    Key("bench_share", 0.2, "share of the source videos held out for it", low=0, high=1),
    Key("tfds.write", False, "also write a TFDS set (ArrayRecord), frames once per clip", free=True),
    Key("tfds.max_pixels", 0, "tfds: area of the stored frames; 0 = as in the video", low=0, free=True),
    Key("tfds.factor", 32, "tfds: their sides are multiples of this; 28 for Qwen2.5-VL", low=1, high=1024, free=True),
    Key("tfds.jpeg_quality", 95, "tfds: quality of the stored frames, 1 to 100", low=1, high=100, free=True),
    Key("tfds.clips_per_shard", 256, "tfds: clips per file", low=1, free=True),
    Key("tfds.runner", "", "tfds: Beam runner, e.g. 'FnApiRunner' or 'DataflowRunner'; '' = no Beam", free=True),
    Key("tfds.runner_options", (), "tfds: command-line options of that runner", free=True, element=str),
    Key("report.clips", 8, "clips shown in report.html", low=0, free=True),
    Key("workers", 1, "processes; the result does not depend on it", low=1, high=1024, free=True),
)
REASONING_KEYS = (
    Key(
        "cold_start.records",
        "",
        "cold_start: questions, such as a curation's train_r1.jsonl",
        content=True,
        bucket=True,
    ),
    Key("cold_start.root", "", "cold_start: media root; '' = the folder of the records", content=True, bucket=True),
    Key(
        "cold_start.system_file",
        "",
        "cold_start: file with the system prompt of records that bring none; '' = that of prompt.system='st_cot'",
        content=True,
        bucket=True,
    ),
    Key("cold_start.per_scenario", 2000, "cold_start: questions drawn per scenario", low=1, free=True),
    Key("cold_start.paths", 3, "cold_start: reasoning paths per question", low=1, high=1024),
    Key(
        "cold_start.style",
        "full",
        "cold_start, oracle: reasoning in the five steps of ST-CoT, or its two spatial states and their outcome alone, "
        "for models too small for sentences (one path a question)",
        choices=("full", "brief"),
    ),
    Key(
        "cold_start.filter",
        "best_of_sample",
        "cold_start: keep of each question the best path above the threshold, every such path, or every path that "
        "earns a reward",
        choices=("best_of_sample", "every_path", "no_filter"),
        free=True,
    ),
    Key(
        "cold_start.total",
        7000,
        "cold_start: records, equal shares over scenarios; 0 = all that pass",
        low=0,
        free=True,
    ),
    Key("cold_start.reward", "paper", "cold_start: preset of the reward", choices=("paper", "release")),
    Key(
        "teacher.kind",
        "oracle",
        "who writes reasoning or descriptions: the measured values (cold_start only), a model behind "
        "MLLM4D_TEACHER_URL, or its stored replies",
        choices=("oracle", "endpoint", "replay"),
    ),
    Key("teacher.model", "", "teacher: the model's name at the endpoint"),
    Key("teacher.num_frames", 32, "teacher: most frames it is sent per request", low=2, high=4096),
    Key("teacher.temperature", 1.0, "teacher: for reasoning; descriptions are asked for at 0", low=0, high=100),
    Key("teacher.cache", "", "teacher: folder of stored replies; '' = replies/ in the workdir", free=True),
    Key("teacher.concurrency", 4, "teacher: requests in flight", low=1, high=1024, free=True),
    Key("teacher.requests_per_minute", 0.0, "teacher: limit on requests; 0 = none", low=0, free=True),
)
CURATE_KEYS = (*CLIP_KEYS, *REASONING_KEYS)
