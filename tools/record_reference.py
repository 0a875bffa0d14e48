"""Records what transformers computes with a checkpoint, for `run.py --config=configs/verify.py` to compare with.

python tools/record_reference.py --model=HF_DIR --out=DIR [--cases=text,image,video,batch] [--video=FILE] [--image=FILE]

Runs on the CPU in float32 (4 bytes a parameter, so an 8B model wants 40 GB of memory) with transformers' own positions,
plain attention and a greedy continuation. Needs requirements-reference.txt. Writes one npz a case, config.json,
manifest.json and, for small models, grads_batch.json; no weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.reference import cases

DETAIL = {"text": 2, "image": 2, "video": 2, "batch": 1, "multi": 0}
GRADS_UP_TO = 200_000_000  # parameters; --grads=auto records gradients of smaller models only


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    import torch
    import transformers

    from tools.reference import tensors

    out, model, prompts = Path(args.out), tensors.load(args.model), args.prompts
    parameters = sum(parameter.numel() for parameter in model.parameters())
    manifest = {
        "model": str(args.model),
        "model_type": model.config.model_type,
        "params": parameters,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dtype": "float32",
        "seed": args.seed,
        "rope_rule": position_rule(model, prompts),
        "cases": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(args.model) / "config.json", out / "config.json")
    for name in args.cases:
        side, rows = case_rows(args, prompts, name)
        inputs = cases.batch(prompts, rows, side)
        arrays = tensors.record(model, inputs, DETAIL[name])
        if side == "left":
            arrays |= tensors.generate(model, inputs)
        np.savez_compressed(out / f"{name}.npz", **arrays)
        manifest["cases"][name] = summary(arrays, side)
        print(f"{name}: {manifest['cases'][name]}", flush=True)
        if name == "batch" and (args.grads == "on" or (args.grads == "auto" and parameters <= GRADS_UP_TO)):
            found = tensors.record_gradients(model, inputs, name)
            (out / "grads_batch.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    files = sorted(path for path in out.iterdir() if path.suffix in (".npz", ".json"))
    manifest["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    print(f"wrote {len(files) + 1} files to {out}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="record_reference.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder: Qwen3-VL, Qwen3-VL-MoE or Qwen2.5-VL")
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument("--cases", default="text,image,video,batch", help=f"some of {','.join(cases.CASES)}")
    parser.add_argument("--video", default="", help="a clip for the case 'video' (default: random pixels)")
    parser.add_argument("--image", default="", help="a picture for the case 'image' (default: random pixels)")
    parser.add_argument("--question", default="What happens here?", help="asked about --video and --image")
    parser.add_argument("--num_frames", type=int, default=8, help="at most this many frames of --video")
    parser.add_argument("--max_pixels", type=int, default=50176, help="largest area of a frame or picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of random ids and pixels")
    parser.add_argument("--grads", choices=("auto", "on", "off"), default="auto", help="record grads_batch.json")
    args = parser.parse_args(argv[1:])
    args.cases, model, out = list(dict.fromkeys(args.cases.split(","))), Path(args.model), Path(args.out)
    for name in args.cases:
        if name not in cases.CASES:
            parser.error(f"unknown case '{name}' (known: {', '.join(cases.CASES)})")
    for name, file in (("video", args.video), ("image", args.image)):
        if file and not Path(file).is_file():
            parser.error(f"--{name}: there is no file '{file}'")
        if file and not (model / "tokenizer.json").is_file():
            parser.error(f"--{name} needs a tokenizer.json in {model}")
    if not (model / "config.json").is_file():
        parser.error(f"--model: there is no config.json in '{model}'")
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out: '{out}' is not empty")
    try:
        args.prompts = cases.PromptMaker.from_folder(args.model, args.seed)
    except ValueError as problem:
        parser.error(f"--model: {problem}")
    return args


def case_rows(args: argparse.Namespace, prompts: cases.PromptMaker, name: str) -> tuple[str, list[cases.PromptRow]]:
    """Return (side of the padding, rows): made up, or for a given clip or picture encoded as a run would encode it."""
    file = {"video": args.video, "image": args.image}.get(name, "")
    if not file:
        return cases.make_case(prompts, name)
    from mllm4d_jax.encode.encoder import Encoder
    from mllm4d_jax.encode.example import VideoOptions
    from mllm4d_jax.encode.processor_config import ProcessorConfig
    from mllm4d_jax.encode.tokenizer import Tokenizer
    from mllm4d_jax.qa.records import Record

    pixels = {"max_pixels": args.max_pixels, "image_max_pixels": args.max_pixels, "image_min_pixels": 784}
    options = VideoOptions(num_frames=args.num_frames, min_pixels=784, **pixels)
    config, tokenizer = ProcessorConfig.from_folder(args.model), Tokenizer.from_folder(args.model)
    asked = [{"type": name, "path": str(Path(file).resolve())}, {"type": "text", "text": args.question}]
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": "It moves to the left."})
    example = Encoder(config, tokenizer, options, None).encode(Record(Path(file).name, messages))
    return "left", [cases.example_row(example)]


def position_rule(model, prompts: cases.PromptMaker) -> str:
    """Return which of our position rules this version of transformers follows, by a clip on which they all differ.

    Raises ValueError if it follows none of them.
    """
    if prompts.family == "qwen3_vl":
        return "release"  # time is in the text; there is only one rule
    from mllm4d_jax.encode.positions import RULES, mrope_positions
    from tools.reference import tensors

    probe = cases.Pixels("video", 4, 2, 2, 0.6)
    row = prompts.row((cases.Text("a b"), probe, cases.Text("c d e")), np.random.default_rng(0))
    inputs = tensors.tensors(cases.batch(prompts, [row], "right"))
    asked = {name: inputs[name] for name in inputs if name not in ("input_ids", "labels", "pixel_values_videos")}
    theirs, _ = model.model.get_rope_index(inputs["input_ids"], **asked)
    for rule in RULES:
        ours, _ = mrope_positions(
            row.tokens,
            [grid for grid, _, _ in row.media],
            image_token_id=prompts.ids[0],
            video_token_id=prompts.ids[1],
            merge_size=prompts.merge_size,
            family=prompts.family,
            second_per_grid=(probe.seconds,),
            tokens_per_second=model.config.vision_config.tokens_per_second,
            rule=rule,
        )
        if np.array_equal(ours, theirs[:, 0].numpy()):
            return rule
    raise ValueError(f"this version of transformers places video tokens by none of the rules {', '.join(RULES)}")


def summary(arrays: dict[str, np.ndarray], side: str) -> dict:
    """Return a case's line in the manifest. `gen_margin`: the smallest lead of a greedy choice over the second best;
    `router_min_gap`: the smallest lead of a chosen expert over the best one not chosen, in probability."""
    rows, length = arrays["input_ids"].shape
    found = {"B": rows, "S": length, "pad_side": side, "loss": float(arrays["loss"])}
    if "gen_logits" in arrays:
        best = np.sort(arrays["gen_logits"], -1)[..., -2:]
        found["gen_margin"] = float((best[..., 1] - best[..., 0]).min())
    gaps = []
    real = arrays["attention_mask"].reshape(-1) == 1
    for name in (name for name in arrays if name.startswith("router_") and name.endswith("_logits")):
        scores, chosen = arrays[name][real].astype(np.float64), arrays[name.replace("logits", "index")].shape[-1]
        if chosen == scores.shape[-1]:
            continue
        odds = np.sort(np.exp(scores - scores.max(-1, keepdims=True)), -1)[:, ::-1]
        odds /= odds.sum(-1, keepdims=True)
        gaps.append(float((odds[:, chosen - 1] - odds[:, chosen]).min()))
    return found | ({"router_min_gap": min(gaps)} if gaps else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv))
