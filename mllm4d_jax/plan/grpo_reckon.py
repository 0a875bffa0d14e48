"""Memory, operations and bytes of a step of reinforcement learning, reckoned from the shapes without compiling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.models.flops import Cost, Tuning, Work, padded_work, step_flops
from mllm4d_jax.parallel.chips import GIB
from mllm4d_jax.plan.compile import itemsize
from mllm4d_jax.plan.grpo_job import (
    GrpoJob,
    candidates,
    decode_rungs,
    differences,
    division_problem,
    mesh_shape,
)
from mllm4d_jax.plan.memory import GPUS, USABLE, Parameters, by_kind, parameter_table, parameters
from mllm4d_jax.plan.step import PlanError, PlanJob, Texts

COPY = "sampler's weights"  # the base weights on the sampling mesh
MARGIN = 0.85  # share of a chip's memory up to which reckoned settings are proposed


def cache_bytes(job: GrpoJob, rows: int, slots: int, branches: int = 1) -> int:
    """Bytes of the keys and values of all layers: `rows` prompts with so many branches of `slots` tokens each."""
    t = job.model.text
    return 2 * t.num_layers * rows * branches * t.num_kv_heads * slots * t.head_dim * itemsize(job.config)


def decode_bytes(weights: float, prompts: float, per_slot: float, rungs: Sequence[tuple[int, int]]) -> float:
    """Bytes that a device reads while decoding.

    Every step reads the weights, the prompts' cache (once for all branches) and the whole of the branches' cache, used
    or not.

    Args:
      weights, prompts: bytes on the device; per_slot: of one position of its branches.
      rungs: (positions, steps), see `plan_job.decode_rungs`.
    """
    return float(sum(steps * (weights + prompts + per_slot * slots) for slots, steps in rungs))


def rows_of_sampler(job: GrpoJob, data: int) -> int:
    """Rows of the sampler's arrays: its prompts, filled up to a multiple of the devices they are split over."""
    return -(-job.at_once // data) * data


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one run of each program, over all devices; with the recomputation of backward passes.

    Attributes:
      encode, prefill: of all prompts (prefill: of those that are sampled at a time).
      score: log-probs of a micro-batch without a gradient; add: with it.
      decode: function of a cache's positions: of one token for each branch.
    """

    encode: float
    prefill: float
    score: float
    add: float
    decode: Callable[[int], float]


def flops(job: GrpoJob, tuning: Tuning, mean: int, data: int) -> Flops:
    """FLOPs for completions of `mean` tokens.

    Args:
      data: devices that the sampler's prompts are split over.
    """
    p, sizes = job.prompt, job.row_sizes(mean)
    area, rows, sampled = p.frame_patches, job.rows // job.parts, rows_of_sampler(job, data)
    frames = job.prompts * p.frames

    def forward(work: Work) -> float:
        return step_flops(job.model, work, tuning).total.forward

    def decode(slots: int) -> float:
        branches = sampled * job.branches
        return forward(Work(branches, branches * (p.length + slots), 0, 0, 0, branches))

    learned = padded_work(sizes.layout, rows, 0, 0, rows * sizes.supervised)
    cost: Cost = step_flops(job.model, learned, tuning).total
    return Flops(
        encode=forward(Work(0, 0, frames * area, frames * area**2, frames * area**2, 0)),
        prefill=forward(Work(sampled * p.length, sampled * p.length * (p.length + 1) // 2, 0, 0, 0, sampled)),
        score=cost.forward,
        add=cost.hardware,
        decode=decode,
    )


def memory(job: GrpoJob, shape: dict[str, int], remat: str, table: Parameters) -> dict[str, dict[str, float]]:
    """Bytes on one device while sampling and while learning, both with completions as long as the cap, by kind.

    Args:
      shape: of the learner's mesh.
      remat: "none", "full" or "dots".
      table: from `plan_memory.parameter_table`.

    Learning is reckoned as in `plan_memory.by_kind`; the reference is a further tree of what is trained. While sampling
    there are the caches, before a branch's last growth the smaller one besides, and the branches' logits thrice in
    fp32. Base weights that are laid out a second time (rollout.tensor) are there all the time.
    """
    devices, item = math.prod(shape.values()), itemsize(job.config)
    sizes, other = job.row_sizes(job.cap), job.config.rollout.tensor
    shards = shape["data"] * shape["fsdp"]
    plain = PlanJob(job.config, job.model, sizes, job.rows, job.per_row, Texts())
    kinds = by_kind(plain, job.rows / job.parts / shards, shape["fsdp"], remat, shape["tensor"], table)
    _, trainable, _ = parameters(plain, table, shape["fsdp"], shape["tensor"])
    tensor = other or shape["tensor"]
    data = devices // tensor
    frozen, adapter, _ = parameters(plain, table, 1, tensor)
    kept = {"weights": kinds.pop("weights"), COPY: frozen * item if other else 0}
    kept |= {"reference": 4 * trainable * (job.objective.beta > 0), "features": _features(job, item)}
    rows, t = rows_of_sampler(job, data) // data, job.model.text
    split = tensor if t.num_kv_heads % tensor == 0 else 1
    rungs = decode_rungs(ladder(job, data), job.config.rollout.chunk, job.cap, job.cap) or [(1, 1)]
    sampling = {
        "adapter, optimiser": 3 * 4 * trainable + (4 * adapter if other else 0),
        "prompt cache": cache_bytes(job, rows, job.prompt.length) / split,
        "branch cache": cache_bytes(job, rows, rungs[-1][0], job.branches) / split,
        "cache before growth": cache_bytes(job, rows, rungs[-2][0] if len(rungs) > 1 else 0, job.branches) / split,
        "logits": 3 * 4 * rows * job.branches * t.vocab_size / tensor,
    }
    return {"sampling": kept | sampling, "learning": kept | kinds}


def ladder(job: GrpoJob, data: int) -> Ladder:
    """The sampler's."""
    return Ladder(ratio=job.config.rollout.ladder_ratio, shards=data)


def _features(job: GrpoJob, item: int) -> float:
    """Bytes of the prompts' vision features, on a device that holds them whole."""
    v = job.model.vision
    places = job.prompts * job.prompt.frames * job.prompt.frame_patches // v.merge_size**2
    return places * v.out_hidden_size * (1 + len(v.deepstack)) * item


def needed(found: dict[str, dict[str, float]]) -> float:
    """Bytes of the phase that wants most."""
    return max(sum(kinds.values()) for kinds in found.values())


def choose(job: GrpoJob, devices: int, hbm: int) -> tuple[GrpoJob, str]:
    """(the job under settings that are reckoned to fit the devices, what has to be set for that; '' for nothing).

    The config's own are taken where they can work.

    Raises:
      PlanError: no settings are found.
    """
    table = parameter_table(job.config, job.model)
    try:
        shape = mesh_shape(dict(job.config.mesh), devices)
        problem = division_problem(job, shape)
        wants = 0.0 if problem else needed(memory(job, shape, job.config.model.remat, table))
        if not problem and wants <= MARGIN * hbm:
            return job, ""
        problem = problem or f"about {wants / GIB:.0f} GiB would be wanted of {hbm / GIB:.0f}"
    except ValueError as error:
        problem = str(error)
    for settings in candidates(job, devices):
        other = job.with_settings(settings)
        shape = {axis: settings[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")}
        if needed(memory(other, shape, job.config.model.remat, table)) <= MARGIN * hbm:
            changed = differences(settings, job.config, devices)
            flags = " ".join(f"--config.{name}={value}" for name, value in changed.items())
            return other, f"not as configured ({problem}), but with {flags}"
    raise PlanError(
        f"{problem}; no mesh of {devices} devices was found that {job.prompts} prompts x {job.branches} completions of "
        f"{job.cap} tokens fit: fewer prompts, a smaller rollout.max_new_tokens, or more devices"
    )


def gpu_record(job: GrpoJob) -> list[dict[str, Any]]:
    """For 1 and 8 GPUs: bytes by kind with the configured prompts, and the most prompts that fit.

    Several GPUs split the learner's weights (mesh.fsdp) and share them while sampling (rollout.tensor); rows hold as
    many completions of a prompt as leave a row for each.
    """
    table, out = parameter_table(job.config, job.model), []
    for devices in (1, 8):
        per_row = next(
            (n for n in range(job.branches, 0, -1) if not job.branches % n and not _rows(job, n) % devices), 1
        )
        heads = job.model.text.num_kv_heads
        share = max(t for t in range(1, devices + 1) if not devices % t and not heads % t)
        planned = job.with_settings(
            {"learner.completions_per_row": per_row, "rollout.tensor": share if devices > 1 else 0}
        )
        shape = {"data": 1, "fsdp": devices, "tensor": 1}
        for remat in ("full", "dots", "none"):
            found = memory(planned, shape, remat, table)
            twice = memory(planned.with_settings({"rollout.prompts": 2 * job.prompts}), shape, remat, table)
            sums = {phase: (sum(found[phase].values()), sum(twice[phase].values())) for phase in found}
            most = {name: largest_prompts(job.prompts, sums.values(), USABLE * hbm) for name, hbm in GPUS.items()}
            out.append(
                dict(
                    devices=devices,
                    remat=remat,
                    completions_per_row=per_row,
                    bytes=found,
                    total=needed(found),
                    largest_prompts=most,
                )
            )
    return out


def _rows(job: GrpoJob, per_row: int) -> int:
    return job.prompts * (job.branches // per_row)


def largest_prompts(prompts: int, pairs: Any, limit: float) -> int:
    """Most prompts for which every phase stays below the limit, from its bytes for `prompts` and for twice as many."""
    return min(math.floor(prompts + prompts * (limit - one) / max(two - one, 1.0)) for one, two in pairs)


def gpu_table(job: GrpoJob) -> str:
    """Markdown: a line for each number of GPUs and remat policy."""
    lines = [
        f"Reckoned, not compiled, for completions of {job.cap} tokens; several devices are those of mesh.fsdp and of "
        f"rollout.tensor. {USABLE:.0%} of the memory is counted as usable.",
        "",
        "| devices | remat | completions per row | weights | sampler's weights | caches | sampling, GiB | "
        "activations | learning, GiB | " + " | ".join(f"most prompts, {name}" for name in GPUS) + " |",
        "|---:|---|" + "---:|" * (7 + len(GPUS)),
    ]
    for r in gpu_record(job):
        sampling, learning = ({k: n / GIB for k, n in r["bytes"][phase].items()} for phase in ("sampling", "learning"))
        caches = sampling["prompt cache"] + sampling["branch cache"] + sampling["cache before growth"]
        activations = learning["kept activations"] + learning["working activations"]
        lines.append(
            f"| {r['devices']} | {r['remat']} | {r['completions_per_row']} | {sampling['weights']:.2f} | "
            f"{sampling[COPY]:.2f} | {caches:.2f} | {sum(sampling.values()):.2f} | "
            f"{activations:.2f} | {sum(learning.values()):.2f} | "
            + " | ".join(str(max(0, n)) for n in r["largest_prompts"].values())
            + " |"
        )
    return "\n".join(lines)
