"""Devices that have too little memory for a run, said in words: what was wanted, and which key to change to what."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import ml_collections

from mllm4d_jax.parallel.chips import GIB
from mllm4d_jax.parallel.mesh import mesh_shape
from mllm4d_jax.parallel.place import memory_stats
from mllm4d_jax.plan.job import GrpoJob, Lengths, PlanError, PlanJob
from mllm4d_jax.plan.memory import MARGIN, choose, divisors, learning, parameter_table, rollout_memory
from mllm4d_jax.run.fitting import SHARE, out_of_memory, remat_forms, wanted_bytes

SAMPLING, LEARNING, LOADING = "sampling", "training", "loading the model"
# What a part of the program does; the innermost one in a traceback counts.
_DOING: Mapping[str, str] = MappingProxyType(
    {
        "mllm4d_jax.generate": SAMPLING,
        "mllm4d_jax.grpo.learner": LEARNING,
        "mllm4d_jax.sft": LEARNING,
        "mllm4d_jax.models.hf": LOADING,
        "mllm4d_jax.run.build": LOADING,
        "mllm4d_jax.run.start": LOADING,
    }
)
_PHASES: Mapping[str, str] = MappingProxyType({SAMPLING: "sampling", LEARNING: "learning"})  # of `rollout_memory`
# Settings are proposed that are reckoned to want at most this share of those that failed, whatever these were reckoned.
_LESS = 0.85
_SMALLER = "video.num_frames, video.max_pixels"


class DeviceMemoryError(ValueError):
    """The devices have too little memory for a program; the message says what to change."""


def of_memory(problem: BaseException, config: ml_collections.ConfigDict) -> DeviceMemoryError | None:
    """Return an error of the devices' memory with what can be done about it; None for other errors.

    Args:
      problem: as it was raised, with its traceback.
      config: of the run.
    """
    if not out_of_memory(problem):
        return None
    stats = [s for s in map(memory_stats, jax.local_devices()) if "bytes_limit" in s]
    fullest = max(stats, key=lambda s: s["bytes_in_use"] / s["bytes_limit"], default=None)
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(problem.__traceback__)]
    doing = next((what for name in reversed(names) for part, what in _DOING.items() if name.startswith(part)), "")
    return shortage(str(problem), config, doing, jax.device_count(), fullest)


def shortage(
    message: str, config: ml_collections.ConfigDict, doing: str, devices: int, stats: Mapping[str, int] | None
) -> DeviceMemoryError:
    """Return the error for what the compiler or the runtime said.

    Args:
      message: of theirs.
      doing: what the run did, "" if not known.
      devices: it has.
      stats: "bytes_limit" and "bytes_in_use" of the fullest device; None if it does not say.
    """
    wanted = wanted_bytes(message)
    text = "the devices have too little memory" + (f" for {doing}" if doing else "")
    if wanted:
        text += f": {wanted / GIB:.2f} GiB were wanted"
    if stats is not None:
        text += f"{' and' if wanted else ':'} {stats['bytes_in_use'] / GIB:.2f} of {stats['bytes_limit'] / GIB:.2f} GiB"
        text += " are in use on the fullest"
    if not wanted:
        text += f" ({message.splitlines()[0]})"
    limit = None if stats is None else int(SHARE * stats["bytes_limit"])
    try:
        told = advice(config, doing, devices, limit)
    except ValueError as error:
        told = (
            "Set a larger train.accumulation or mesh.fsdp, or less of video.max_pixels; to which values cannot be "
            f"reckoned: {error}"
        )
    return DeviceMemoryError(f"{text}. {told}")


def advice(config: ml_collections.ConfigDict, doing: str, devices: int, limit: int | None) -> str:
    """Return which keys to change, to values that are reckoned to fit where that can be reckoned.

    Args:
      limit: bytes of a device that programs can have, None if not known. Other arguments as for `shortage`.
    """
    if config.task == "sft":
        return _training(config, devices, limit)
    if config.task == "grpo":
        return _rollouts(config, doing, devices, limit)
    more = f"--config.mesh.tensor={devices} (the weights split over all devices)"
    tensor = [more] if devices > 1 and "mesh" in config and config.mesh.tensor not in (-1, devices) else []
    keys = [name for name in ("prompts_at_once", "questions_per_video") if config.get(name, 1) > 1]
    if keys and doing != LOADING:
        halved = [f"--config.{name}={config[name] // 2}" for name in keys]
        return f"Half as many in the model at a time: {', or '.join([*halved, *tensor])}; or less of {_SMALLER}"
    if tensor:
        return f"Set {tensor[0]}"
    if "video" in config and doing != LOADING:
        return f"Set less of {_SMALLER}, max_new_tokens"
    return "The model is too large for one of these devices: take one with more memory, or bfloat16 weights"


def _flags(settings: Mapping[str, int | str]) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in settings.items())


def _training(config: ml_collections.ConfigDict, devices: int, limit: int | None) -> str:
    """Advice for fine-tuning: parts of a batch, then weights split over more devices."""
    now, *others = _changes(config, devices)
    table, base = parameter_table(PlanJob.of(config, Lengths())), None
    for settings in (now, *others):
        job = PlanJob.of(config, Lengths()).with_settings(settings)
        shape = mesh_shape(dict(job.config.mesh), devices)
        rows, over = divmod(job.rows, shape["data"] * shape["fsdp"])
        remat = remat_forms(job.config.model.remat, "")[-1]
        wants = sum(learning(job, job.sizes, max(rows, 1), shape, remat, table).values())
        if base is None:
            base = wants
        elif not over and wants <= min(_LESS * base, limit or base):
            return f"Set {_flags(settings)}: about {wants / GIB:.1f} GiB are reckoned then, {base / GIB:.1f} now"
    return (
        f"{base / GIB:.1f} GiB are reckoned for a step as it is, and neither more micro-batches nor a mesh of these "
        f"{devices} devices makes it small enough: set less of {_SMALLER}, data.questions_per_video, lora.rank, or "
        "take more devices (mesh.fsdp)"
    )


def _changes(config: ml_collections.ConfigDict, devices: int) -> Iterator[dict[str, int | str]]:
    """Yield settings for fine-tuning, the present ones first, then those that cost little speed before others."""
    yield {}
    c, shape = config.train, mesh_shape(dict(config.mesh), devices)
    policy = {} if config.model.remat in ("auto", "full") else {"model.remat": "auto"}
    if policy:
        yield policy
    meshes = [{}]
    for fsdp in divisors(devices // shape["tensor"]):
        if fsdp > shape["fsdp"]:
            meshes.append({"mesh.data": devices // shape["tensor"] // fsdp, "mesh.fsdp": fsdp})
    for mesh in meshes:
        for parts in divisors(c.batch_size):
            # A group of questions about a clip is not divided.
            whole = c.batch_size // parts % config.data.questions_per_video == 0 and not config.data.rows
            if parts > c.accumulation and whole:
                yield policy | mesh | {"train.accumulation": parts}
        if mesh:
            yield policy | mesh


def _rollouts(config: ml_collections.ConfigDict, doing: str, devices: int, limit: int | None) -> str:
    """Advice for reinforcement learning: what `memory.choose` finds, with fewer prompts in the sampler if need be."""
    config = config.copy_and_resolve_references()
    config.model.remat = remat_forms(config.model.remat, "")[-1]
    job = GrpoJob.of(config, Lengths.parse([], config))
    table = parameter_table(job)

    def reckoned(job: GrpoJob) -> dict[str, float]:
        shape = mesh_shape(dict(job.config.mesh), devices)
        phases = rollout_memory(job, shape, config.model.remat, table)
        return {what: sum(phases[name].values()) / GIB for what, name in _PHASES.items()}

    now = reckoned(job)
    failed, problem = now[doing] if doing in now else max(now.values()), None
    bound = int(min(_LESS * failed * GIB, limit or math.inf) / MARGIN)
    for count in sorted((n for n in divisors(config.rollout.prompts) if n <= job.at_once), reverse=True):
        settings = {} if count == job.at_once else {"rollout.prompts_at_once": count}
        try:
            other, note = choose(job.with_settings(settings), devices, bound)
        except PlanError as error:
            problem = problem or error
            continue
        flags, then = " ".join(filter(None, (_flags(settings), note.partition("but with ")[2]))), reckoned(other)
        return (
            f"Set {flags}: about {then[SAMPLING]:.1f} GiB for sampling and {then[LEARNING]:.1f} for learning are "
            f"reckoned then, {now[SAMPLING]:.1f} and {now[LEARNING]:.1f} now"
        )
    return f"As reckoned, {problem}"
