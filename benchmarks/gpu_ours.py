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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import gpu_work as work
from benchmarks.random_weights import random_arrays
from configs import common
from configs.published import SIZES
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.grpo.setup import make_sampler, sampling_weights
from mllm4d_jax.models.config import MoEConfig
from mllm4d_jax.models.flops import real_work, step_flops
from mllm4d_jax.models.layers import SparseMLP
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
MODEL = "30b_a3b"  # whose sparse layer is measured


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
    a, b = (random_arrays(_shape((side, side), jnp.bfloat16), seed) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    seconds = work.seconds_of(lambda: product(a, b), jax.block_until_ready, 10)
    work.report(f"product of two bf16 {side} x {side}", **_rate(2 * side**3, seconds))
    x, copy = jnp.zeros(numbers, jnp.float32), jax.jit(lambda x: x + 1)
    seconds = work.seconds_of(lambda: copy(x), jax.block_until_ready, 10)
    work.report("copy", gigabytes_per_second=2 * x.nbytes / seconds / 1e9, milliseconds=1e3 * seconds)


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


def sparse(scale: work.Scale) -> None:
    """Report the sparse layer of 30B-A3B, forms of its grouped product, and a dense product of the same FLOPs."""
    size = SIZES[MODEL]
    count, top_k, inner, width = *size.experts, size.hidden
    if scale.size == "tiny":
        count, top_k, inner, width = 8, 2, 64, 128
    dtype, tokens = jnp.dtype(scale.dtype), scale.sparse
    layer, shapes = nnx.split(
        nnx.eval_shape(lambda: SparseMLP(width, MoEConfig(count, top_k, inner, (True,)), dtype=dtype, rngs=nnx.Rngs(0)))
    )
    weights = random_arrays(nnx.to_pure_dict(shapes))
    rows, dense = (random_arrays(_shape(s, dtype)) for s in ((tokens * top_k, width), (width, 2 * inner)))
    sizes = np.random.default_rng(0).multinomial(len(rows), [1 / count] * count)
    grouped, flops = (rows, weights["gate_up"], jnp.asarray(sizes, jnp.int32)), 2 * len(rows) * width * 2 * inner

    def squares(x, weights):
        y = nnx.merge(layer, weights)(x[None], jnp.ones((1, tokens), bool))[0]
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    def both(product):
        return jax.grad(lambda rows, *rest: jnp.sum(jnp.square(product(rows, *rest).astype(jnp.float32))))

    for name, make in GROUPED.items():
        try:
            product = make()
        except ImportError as problem:
            work.report(name, note=str(problem))
            continue
        work.guarded(f"{name}, values", functools.partial(_first_group, name, product, grouped, int(sizes[0])))
        for how, run, times in (("forward", product, 1), ("forward and backward", both(product), 2)):
            case = f"{name}, {how}"
            work.guarded(case, functools.partial(_timed, case, run, grouped, times * flops))
    for how, run, times in (("forward", jnp.matmul, 1), ("forward and backward", both(jnp.matmul), 2)):
        case = f"dense product, {how}"
        work.guarded(case, functools.partial(_timed, case, run, (rows, dense), times * flops))
    case = "layer of the model, forward and backward"  # twice for the gradient; up and gate are half as much again
    work.guarded(case, lambda: _timed(case, jax.grad(squares), (rows[:tokens], weights), 3 * flops))


def _hopper_product():
    """The kernel for Hopper that comes with JAX, with the gradient of the rows: weights are frozen."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    if jax.default_backend() != "gpu":
        raise ImportError("a kernel for GPUs")
    tiles = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=1)

    @jax.custom_vjp
    def product(rows, matrices, sizes):
        return ragged_dot_mgpu.ragged_dot(rows, matrices, group_sizes=sizes, **tiles)

    def backward(kept, pulled):
        matrices, sizes = kept
        back = ragged_dot_mgpu.ragged_dot(pulled, matrices, group_sizes=sizes, transpose_rhs=True, **tiles)
        return back, None, None

    product.defvjp(lambda rows, *rest: (product(rows, *rest), rest), backward)
    return product


def _tokamax_product():
    import tokamax

    return tokamax.ragged_dot


# Forms of the grouped product, by how each is got.
GROUPED: Mapping[str, Callable[[], Callable]] = MappingProxyType(
    {
        "jax.lax.ragged_dot": lambda: jax.lax.ragged_dot,
        "Pallas kernel for Hopper": _hopper_product,
        "tokamax.ragged_dot": _tokamax_product,
    }
)


def _first_group(name: str, product, grouped: tuple, size: int) -> None:
    """Report how far the rows of the first group are from a plain product, as a share of its largest value."""
    rows, matrices, sizes = grouped
    found = jax.jit(product)(rows, matrices, sizes)[:size].astype(jnp.float32)
    wanted = jnp.matmul(rows[:size], matrices[0], preferred_element_type=jnp.float32)
    work.report(f"{name}, values", gap=float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max()))


def _timed(case: str, function, arguments: tuple, flops: float) -> None:
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - started
    seconds = work.seconds_of(lambda: compiled(*arguments), jax.block_until_ready, 5)
    work.report(case, **_rate(flops, seconds), compile_s=compile_s)


def _shape(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def _rate(flops: float, seconds: float) -> dict[str, float | None]:
    peak = peak_flops(jax.devices()[0].device_kind)
    return dict(
        milliseconds=1e3 * seconds,
        tflops=flops / seconds / 1e12,
        of_peak=mfu(flops, seconds, 1, peak),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("card", "sft", "decode", "sparse"))
    parser.add_argument("--candidates", default="", help="what is measured, see the part")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    scale = work.TINY if args.tiny else work.Scale()
    if args.tiny and jax.default_backend() == "gpu":
        scale = scale._replace(dtype="bfloat16")  # what the attention kernels of a GPU take
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.part in ("sft", "decode"):
            work.write_settings(folder, scale.size)
            {"sft": sft, "decode": decode}[args.part](scale, folder, args.candidates)
        else:
            {"card": card, "sparse": sparse}[args.part](scale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
