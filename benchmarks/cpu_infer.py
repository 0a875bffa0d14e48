"""One answer on a CPU: this project in bfloat16 and Transformers in float32, each in a process of its own, in turns.

python tools/make_checkpoint.py --size=2b --out=weights/random-2b
python benchmarks/cpu_infer.py --model=weights/random-2b [--tokens=24] [--side=448] [--rounds=2] [--threads=2]

Needs requirements-reference.txt, in this environment or in that of --reference_python. Both sides get the same tokens
and patches of one image and make the same number of greedy tokens. The first answer of a process, in which programs are
compiled, is not counted. Peak memory is the process's own, loading included. Seconds of the clock depend on what else
the machine does: CPU seconds are printed too, and the load beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

QUESTION = "Which way does the camera move?"
CLOCKS = (("wall", "second"), ("cpu", "second of CPU"))


def main() -> int:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # what both libraries size their pools by
    if args.child:
        answer = {"ours": ours, "theirs": theirs}[args.child](args)
        print(json.dumps(answer))
        return 0
    stored = sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors"))
    print(f"{args.model}: {stored / 2**30:.2f} GiB of weights, {args.tokens} tokens, {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.npz"
        writer = [sys.executable, __file__, *sys.argv[1:], "--child=ours", f"--prompt={prompt}", "--write"]
        subprocess.run(writer, check=True, stdout=subprocess.DEVNULL)
        for _ in range(args.rounds):
            for side, python in (("ours", sys.executable), ("theirs", args.reference_python or sys.executable)):
                command = [python, __file__, *sys.argv[1:], f"--child={side}", f"--prompt={prompt}"]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                print(line(side, json.loads(out.splitlines()[-1])), flush=True)
    return 0


def line(side: str, found: dict) -> str:
    """One run in words."""
    rates = ", ".join(f"{found['decoded'] / found[f'decode_{clock}']:.2f} tokens per {name}" for clock, name in CLOCKS)
    prefill = f"prefill of {found['prompt']} tokens {found['prefill_wall']:.1f} s ({found['prefill_cpu']:.1f} s of CPU)"
    load = os.getloadavg()[0]
    return f"{side:>6}: peak {found['peak']:.2f} GiB, {prefill}, {rates}; load {load:.1f}"


def ours(args: argparse.Namespace) -> dict:
    """This project, with the sampler of the task `infer`."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax.numpy as jnp
    from flax import nnx

    from mllm4d_jax.encode.example import Grid
    from mllm4d_jax.encode.grids import pack_vision
    from mllm4d_jax.generate.policy import SamplingOptions
    from mllm4d_jax.generate.sampler import Sampler
    from mllm4d_jax.models.hf import load_model
    from mllm4d_jax.models.qwen_vl import text_positions, vision_geometry
    from mllm4d_jax.rows.batch import ModelInputs

    if args.write:
        write_prompt(args)
        return {}
    model = load_model(args.model, dtype=jnp.bfloat16)
    data, c = np.load(args.prompt), model.config
    tokens, grid = data["tokens"], Grid("image", *data["grid"].tolist())
    vision, rows = pack_vision(data["patches"], [grid], vision_geometry(c))
    index = np.full((1, len(tokens)), -1, np.int32)
    index[0, tokens == c.image_token_id] = rows
    positions = text_positions(c, tokens, [grid])[0][:, None]
    inputs = ModelInputs(tokens[None], positions, np.ones((1, len(tokens)), np.int32), index, vision, None)
    graphdef, state = nnx.split(model)
    sampler = Sampler(graphdef, chunk=args.tokens)

    def answer(count: int) -> tuple[float, float]:
        started = time.perf_counter(), time.process_time()
        keys = dict(prompt_ids=[0], branches=1, options=SamplingOptions())
        sampler.generate((state,), inputs, max_new_tokens=count, **keys)
        return time.perf_counter() - started[0], time.process_time() - started[1]

    return measured(answer, len(tokens), args.tokens)


def theirs(args: argparse.Namespace) -> dict:
    """Transformers."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(args.threads)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    data = np.load(args.prompt)
    tokens = torch.from_numpy(data["tokens"].astype(np.int64))[None]
    inputs = dict(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        mm_token_type_ids=(tokens == model.config.image_token_id).long(),
        pixel_values=torch.from_numpy(data["patches"]),
        image_grid_thw=torch.from_numpy(data["grid"].astype(np.int64))[None],
    )

    def answer(count: int) -> tuple[float, float]:
        started = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            model.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        return time.perf_counter() - started[0], time.process_time() - started[1]

    return measured(answer, tokens.shape[1], args.tokens)


def measured(answer, prompt: int, tokens: int) -> dict:
    """Seconds of prefill (with the first token) and of the other tokens, and the peak memory of the process in GiB."""
    answer(tokens), answer(1)
    first, whole = answer(1), answer(tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(
        prompt=prompt,
        decoded=tokens - 1,
        peak=peak,
        prefill_wall=first[0],
        prefill_cpu=first[1],
        decode_wall=whole[0] - first[0],
        decode_cpu=whole[1] - first[1],
    )


def write_prompt(args: argparse.Namespace) -> None:
    """An image of noise and a question, as the model sees them."""
    import cv2

    from mllm4d_jax.encode.encoder import Encoder
    from mllm4d_jax.encode.processor_config import ProcessorConfig
    from mllm4d_jax.encode.tokenizer import Tokenizer
    from mllm4d_jax.eval.infer import build_record

    image = str(Path(args.prompt).with_suffix(".png"))
    cv2.imwrite(image, np.random.default_rng(0).integers(0, 256, (args.side, args.side, 3), np.uint8))
    with Encoder(ProcessorConfig.from_folder(args.model), Tokenizer.from_folder(args.model)) as encoder:
        example = encoder.encode(build_record(QUESTION, image=image), add_generation_prompt=True)
    grid = example.grids[0]
    np.savez(args.prompt, tokens=example.tokens, patches=example.patches, grid=[grid.t, grid.h, grid.w])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder in Hugging Face format")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens, at least 2")
    parser.add_argument("--side", type=int, default=448, help="of the image, in pixels")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference_python", default="", help="interpreter that has PyTorch and Transformers")
    for hidden in ("--child", "--prompt"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
