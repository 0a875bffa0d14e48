"""This project's side of gpu.py: one part of it, in a process of its own. Rows go to standard output."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_work as work
from benchmarks.random_weights import random_arrays
from configs import common
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.grpo.setup import make_sampler, sampling_weights
from mllm4d_jax.models.flops import real_work, step_flops
from mllm4d_jax.parallel.chips import peak_flops
from mllm4d_jax.parallel.place import place_rows
from mllm4d_jax.rows.completion_rows import collate_prompts, needed_prompt_sizes
from mllm4d_jax.rows.rows import Group
from mllm4d_jax.run.build import Parts, build
from mllm4d_jax.run.optimizer import init_optimizer
from mllm4d_jax.run.throughput import mfu, peak_memory_gib
from mllm4d_jax.sft.setup import train_step

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


def card(scale: work.Scale) -> None:
    """Report what runs, and what the device reaches on a product and a copy that are nothing else."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    found = dict(device=device.device_kind, python=sys.version.split()[0]) | versions
    if device.platform == "gpu" and (smi := shutil.which("nvidia-smi")):
        asked = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    work.report("versions", **found)
    side, numbers = (8192, 1 << 30) if scale.size != "tiny" else (256, 1 << 16)
    a, b = (random_arrays(shape_of((side, side), jnp.bfloat16), seed) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    seconds = work.seconds_of(lambda: product(a, b), jax.block_until_ready, 10)
    work.report(f"product of two bf16 {side} x {side}", **rate(2 * side**3, seconds))
    x, copy = jnp.zeros(numbers, jnp.float32), jax.jit(lambda x: x + 1)
    seconds = work.seconds_of(lambda: copy(x), jax.block_until_ready, 10)
    work.report("copy", gigabytes_per_second=2 * x.nbytes / seconds / 1e9, milliseconds=1e3 * seconds)


def rate(flops: float, seconds: float) -> dict[str, float | None]:
    """Figures of a product that takes so long."""
    of_peak = mfu(flops, seconds, 1, peak_flops(jax.devices()[0].device_kind))
    return dict(milliseconds=1e3 * seconds, tflops=flops / seconds / 1e12, of_peak=of_peak)


def sft(scale: work.Scale, folder: Path, candidates: str) -> None:
    """Report training steps: `ROWSxN:REMAT`, rows of one clip with N questions each, separated by commas.

    What follows after a stroke is measured only where the one before it fails.
    """
    frozen = None

    def measure(rows: int, questions: int, remat: str) -> None:
        nonlocal frozen
        parts = parts_of("sft", folder, scale, remat=remat, rows=rows, questions=questions)
        frozen = random_arrays(parts.frozen) if frozen is None else frozen
        _step(parts, frozen, scale, folder, rows, questions)

    for alternatives in candidates.split(","):
        for candidate in alternatives.split("/"):
            size, _, remat = candidate.partition(":")
            rows, questions = map(int, size.split("x"))
            case, run = f"{rows} x {questions}, remat {remat}", functools.partial(measure, rows, questions, remat)
            if work.guarded(case, run):
                break


def _step(parts: Parts, frozen: Any, scale: work.Scale, folder: Path, rows: int, questions: int) -> None:
    trainable = random_arrays(parts.trainable)
    opt_state = init_optimizer(parts.optimizer, trainable, parts.mesh)
    clips = [work.make_questions(folder, scale, number, questions) for number in range(rows)]
    batch = parts.shape.collate([[Group(tuple(clip), scale.prefix)] for clip in clips])
    started = time.perf_counter()
    compiled = train_step(parts, trainable, opt_state).lower(trainable, opt_state, frozen, batch).compile()
    compile_s = time.perf_counter() - started
    trees, m = (trainable, opt_state), None

    def step():  # as in a run, the host sends a batch while the device is at work on the one before
        nonlocal trees, m
        *trees, m = compiled(*trees, frozen, place_rows(batch, parts.mesh), np.int32(0))
        return m

    spent = work.seconds_of(step, jax.block_until_ready, scale.steps)
    if not bool(m.finite):
        raise FloatingPointError(f"loss {float(m.loss)}, gradient norm {float(m.grad_norm)}")
    supervised = int((batch.loss_weight > 0).sum())
    flops = step_flops(parts.sizes, real_work(batch.inputs, supervised), parts.tuning).total
    memory, layout = compiled.memory_analysis(), batch.inputs.layout
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    work.report(
        f"{rows} x {questions}, remat {parts.config.model.remat}",
        questions=questions,
        seconds=spent,
        qa_per_second=rows * questions / spent,
        mfu=mfu(flops.model, spent, 1, peak_flops(jax.devices()[0].device_kind)),
        executed_tflops=flops.hardware / spent / 1e12,
        program_gib=(held + memory.temp_size_in_bytes) / GIB,
        peak_gib_so_far=peak_memory_gib(),
        attention=parts.tuning.attention,
        row=f"{layout.prefix} + {layout.slots} x {layout.length}",
        compile_s=compile_s,
        loss=float(m.loss),
    )


def decode(scale: work.Scale, folder: Path, candidates: str) -> None:
    """Report decoding of `PROMPTSxBRANCHES`, separated by commas."""
    parts = parts_of("grpo", folder, scale, remat="none")
    trainable, frozen = jax.block_until_ready((random_arrays(parts.trainable), random_arrays(parts.frozen)))
    weights = sampling_weights(dataclasses.replace(parts, trainable=trainable, frozen=frozen), trainable)
    sampler = make_sampler(parts.config, weights)
    for candidate in candidates.split(","):
        prompts, branches = map(int, candidate.split("x"))
        measure = functools.partial(
            _decode, parts, sampler, weights.of(trainable), scale, folder, prompts, branches, candidate
        )
        work.guarded(candidate, measure)


def _decode(parts, sampler, weights, scale, folder, prompts: int, branches: int, case: str) -> None:
    examples = [work.make_questions(folder, scale, number, 0)[0] for number in range(prompts)]
    sizes = parts.shape.sizes(needed_prompt_sizes(examples))
    inputs = collate_prompts(examples, sizes, parts.shape.geometry, parts.shape.visual_token_ids).inputs
    c = parts.sizes
    options = SamplingOptions(temperature=1.0, banned_ids=(c.image_token_id, c.video_token_id), require_exact=True)
    spent, started = [], time.perf_counter()
    for seed in range(2):  # the first one compiles
        out = sampler.generate(
            weights,
            inputs,
            prompt_ids=list(range(prompts)),
            branches=branches,
            max_new_tokens=scale.tokens,
            options=options,
            seed=seed,
        )
        spent.append(time.perf_counter() - started)
        started = time.perf_counter()
    found = out.statistics
    seconds = sum(s for _, s in found.chunks) / found.steps
    work.report(
        case,
        milliseconds_per_step=1e3 * seconds,
        tokens_per_second=prompts * branches / seconds,
        steps=found.steps,
        prefill_s=found.prefill_seconds,
        prompt=inputs.tokens.shape[1],
        compile_s=spent[0] - spent[1],
        peak_gib_so_far=peak_memory_gib(),
    )


def parts_of(task: str, folder: Path, scale: work.Scale, *, remat: str, rows: int = 1, questions: int = 1) -> Parts:
    """The run's parts as shapes."""
    config = common.config(task)
    config.model.path, config.model.dtype, config.model.remat = str(folder), scale.dtype, remat
    config.video.num_frames, config.video.min_pixels, config.video.max_pixels = (
        scale.frames,
        scale.side**2,
        scale.side**2,
    )
    config.lora.rank, config.lora.alpha = scale.rank, 2.0 * scale.rank
    if task == "sft":
        config.data.questions_per_video, config.train.batch_size = questions, rows * questions
    else:
        config.rollout.chunk = scale.tokens - 1  # one program: what is timed is a step, not how caches grow
    return build(config, devices=jax.devices()[:1], abstract=True)


def shape_of(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The shape of an array on the device."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("card", "sft", "decode"))
    parser.add_argument("--candidates", default="", help="what is measured, see the part")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    scale = work.scale_of(args.tiny, gpu=jax.default_backend() == "gpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.part in ("sft", "decode"):
            work.write_settings(folder, scale.size)
            {"sft": sft, "decode": decode}[args.part](scale, folder, args.candidates)
        else:
            card(scale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
