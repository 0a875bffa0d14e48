"""Questions about videos answered here against Transformers' generate, one by one: questions per second, side by side.

python benchmarks/eval_speed.py [--questions=8] [--frames=16,32] [--side=224] [--tokens=16] [--rounds=3] [--threads=2]

Needs requirements-reference.txt. A random Qwen3-VL in float32, greedy, the same weights, clips, prompts, end tokens and
longest answer for both. Theirs is what a script does: for each question, read the clip, then `generate`. Ours is what
an evaluation does: read a clip once, then answer all questions about it over one shared prefix. Both decode with this
project's decoder, in the main process. They take turns, video by video, after every shape of ours was compiled and
theirs warmed up; figures are medians over videos. Processor seconds stand beside the clock's because they depend less
on what else the machine does. The answers are compared token by token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Answered(NamedTuple):
    """The questions about one video: seconds to read it and to answer, processor seconds of the latter, the tokens."""

    data: float
    answer: float
    cpu: float
    tokens: list[list[int]]


class Ours:
    """One video at a time, all questions together."""

    def __init__(self, folder: Path, encoder: Any, per_video: int, tokens: int, frames: int, side: int) -> None:
        import jax.numpy as jnp
        from flax import nnx

        from configs import common
        from mllm4d_jax.eval.asking import Layout
        from mllm4d_jax.generate.sampler import Sampler
        from mllm4d_jax.models.hf import load_model
        from mllm4d_jax.models.qwen_vl import vision_geometry
        from mllm4d_jax.rows.shape import RowShape

        model, data, c = load_model(folder, dtype=jnp.float32), common.config("eval").data, encoder.config
        graphdef, state = nnx.split(model)
        self._sampler, self._weights = Sampler(graphdef), (state,)
        shape = RowShape.of(
            c,
            vision_geometry(model.config),
            encoder.options,
            prefix_lengths=data.prefix_buckets,
            branch_lengths=data.branch_buckets,
            branches=per_video,
        )
        self._layout = Layout(1, per_video, shape)
        self._encoder, self._tokens = encoder, tokens
        self._options = options(encoder.tokenizer, model.config.text.vocab_size)

    def __call__(self, records: Sequence[Any]) -> Answered:
        started = time.perf_counter()
        examples = self._encoder.encode_group(records, add_generation_prompt=True)
        read, used = time.perf_counter(), time.process_time()
        (group,) = self._layout.groups(examples)
        inputs, keys = self._layout.collate([group])
        numbers = [[0] * len(row) for row in keys]
        how = dict(max_new_tokens=self._tokens, options=self._options)
        out = self._sampler.generate(self._weights, inputs, prompt_ids=numbers, branches=len(keys[0]), **how)
        spent, cpu = time.perf_counter() - read, time.process_time() - used
        found = {key: out.ids(0, slot) for slot, key in enumerate(keys[0]) if key}
        return Answered(read - started, spent, cpu, [found[record.key] for record in records])


class Theirs:
    """Each question with its own copy of the clip."""

    def __init__(self, folder: Path, encoder: Any, tokens: int) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        from tools.reference import cases

        self._model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._prompts, self._encoder = cases.PromptMaker.from_folder(folder, 0), encoder
        found = options(encoder.tokenizer, self._model.config.text_config.vocab_size)
        self._ends = set(found.eos_ids)
        self._how = dict(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(found.eos_ids),
            pad_token_id=found.eos_ids[0],
            suppress_tokens=list(found.banned_ids),
        )

    def __call__(self, records: Sequence[Any]) -> Answered:
        import torch

        from tools.reference import cases
        from tools.reference.tensors import tensors

        data = answer = cpu = 0.0
        found = []
        for record in records:
            started = time.perf_counter()
            row = cases.example_row(self._encoder.encode(record, add_generation_prompt=True))
            read, used = time.perf_counter(), time.process_time()
            batch = tensors(cases.batch(self._prompts, [row], "left"))
            del batch["labels"]
            self._model.model.rope_deltas = None  # kept from the call before otherwise
            with torch.inference_mode():
                out = self._model.generate(**batch, **self._how)[0, batch["input_ids"].shape[1] :].tolist()
            answer, cpu = answer + time.perf_counter() - read, cpu + time.process_time() - used
            data += read - started
            found.append([token for token in out if token not in self._ends])
        return Answered(data, answer, cpu, found)


def options(tokenizer: Any, vocab_size: int) -> Any:
    """How both sides draw: greedily, without visual placeholders, up to an end token."""
    from mllm4d_jax.generate.policy import SamplingOptions, banned_token_ids

    return SamplingOptions(eos_ids=tokenizer.eos_ids, banned_ids=banned_token_ids(tokenizer, vocab_size))


def compare(folder: Path, frames: int, args: argparse.Namespace, shape: Any) -> None:
    """Runs both sides on the same videos and prints their lines."""
    from benchmarks import sft_contenders as sides
    from benchmarks.small_model import write_model
    from mllm4d_jax.data.record_file import RecordFile
    from mllm4d_jax.encode.encoder import Encoder
    from mllm4d_jax.encode.example import VideoOptions
    from mllm4d_jax.encode.processor_config import ProcessorConfig
    from mllm4d_jax.encode.tokenizer import Tokenizer
    from mllm4d_jax.qa.records import as_prompt

    n = args.questions
    path = sides.write_world(folder / "world", args.rounds + 1, n)
    write_model(folder / "model", shape, [path.read_text(encoding="utf-8")])
    source, model = RecordFile(path, path.parent), folder / "model"
    records = [as_prompt(source[i]) for i in range(len(source))]
    videos = [records[at : at + n] for at in range(0, len(records), n)]
    area = args.side**2
    video_options = VideoOptions(num_frames=frames, min_pixels=area, max_pixels=area)
    with Encoder(ProcessorConfig.from_folder(model), Tokenizer.from_folder(model), video_options) as encoder:
        ours = Ours(model, encoder, n, args.tokens, frames, args.side)
        theirs = Theirs(model, encoder, args.tokens)
        prompt = len(encoder.encode(records[0], add_generation_prompt=True).tokens)
        for asked in videos:  # compiles every shape
            ours(asked)
        theirs(videos[0][:1])
        pairs = [(ours(asked), theirs(asked)) for asked in videos[1:]]
    for name, runs in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True):
        data, answer, cpu = (statistics.median(getattr(r, part) for r in runs) for part in ("data", "answer", "cpu"))
        both = statistics.median(r.data + r.answer for r in runs)
        print(
            f"{frames:7d}  {prompt:6d}  {name:6s}  {data:6.2f}  {answer:8.2f}  {cpu:6.2f}  {n / answer:6.2f}  "
            f"{n / both:14.2f}"
        )
    faster = statistics.median(b.answer / a.answer for a, b in pairs)
    with_data = statistics.median((b.data + b.answer) / (a.data + a.answer) for a, b in pairs)
    less = statistics.median(b.cpu / a.cpu for a, b in pairs)
    answers = [(x, y) for a, b in pairs for x, y in zip(a.tokens, b.tokens, strict=True)]
    lengths = [len(x) for x, _ in answers]
    print(
        f"         ours is {faster:.2f} times as fast, {with_data:.2f} with data, and takes {less:.2f} times less CPU "
        f"time; {sum(x == y for x, y in answers)} of {len(answers)} answers are the same tokens ({min(lengths)} to "
        f"{max(lengths)} long)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--questions", type=int, default=8, help="about each video")
    parser.add_argument("--frames", default="16,32")
    parser.add_argument("--side", type=int, default=224, help="side of a frame in pixels")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    parser.add_argument("--rounds", type=int, default=3, help="measured videos")
    parser.add_argument("--threads", type=int, default=2, help="cores for both")
    parser.add_argument("--layers", type=int, default=6, help="of the decoder and of the tower")
    parser.add_argument("--width", type=int, default=512, help="of the decoder; the tower has half")
    args = parser.parse_args()
    # Both libraries size their thread pools by the cores they may use, when they are imported.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Spinning at barriers stalls torch for seconds when another process has one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from benchmarks.small_model import ModelSize

    torch.set_num_threads(args.threads)
    shape = ModelSize(args.layers, args.width, args.layers, args.width // 2)
    print(f"{args.questions} questions a video, frames of {args.side} x {args.side}, {args.threads} threads, {shape}")
    print(" frames  prompt  side    data s  answer s   CPU s     Q/s   Q/s with data", flush=True)
    for frames in map(int, args.frames.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), frames, args, shape)


if __name__ == "__main__":
    main()
