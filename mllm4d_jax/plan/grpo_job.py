"""What is planned of a run of reinforcement learning: its sizes, and a mesh and rows for which it can run at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.grpo.presets import ObjectiveConfig
from mllm4d_jax.grpo.settings import objective_of
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.parallel.mesh import AXES, MeshError
from mllm4d_jax.plan.step import PlanError, clip_shape, model_config
from mllm4d_jax.rows.buckets import RowBuckets
from mllm4d_jax.rows.completion_rows import PromptSizes
from mllm4d_jax.rows.rows import RowSizes

EXPECTED = 512  # tokens of a completion with five short steps of reasoning and two blocks of centres
LONGEST = 1.5  # the longest completion of a step is taken to have that many times the tokens of the mean one


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What no config says, in tokens.

    Attributes:
      text: of a prompt besides its clip: system text, question, options.
      completion: of an average completion; 0 = `EXPECTED`, or the cap if that is shorter.
    """

    text: int = 384
    completion: int = 0


@dataclasses.dataclass(frozen=True)
class GrpoJob:
    """What is planned, apart from the devices.

    Attributes:
      config: of the run.
      model: sizes of the model.
      objective: of the run.
      prompt: what prompts are padded to.
      lengths: what the sizes suppose.
    """

    config: ml_collections.ConfigDict
    model: ModelConfig
    objective: ObjectiveConfig
    prompt: PromptSizes
    lengths: Lengths

    @property
    def prompts(self) -> int:
        return self.config.rollout.prompts

    @property
    def branches(self) -> int:
        return self.config.rollout.completions

    @property
    def per_row(self) -> int:
        """Completions of a learner's row."""
        return self.config.learner.completions_per_row or self.branches

    @property
    def parts(self) -> int:
        """Micro-batches of a step."""
        return self.config.train.accumulation

    @property
    def rows(self) -> int:
        """The learner's rows of a step."""
        return self.prompts * (self.branches // self.per_row)

    @property
    def separate(self) -> bool:
        """Whether log-probs are made before the update, see `Learner.update`."""
        return self.parts > 1 or self.config.objective.iterations > 1

    @property
    def scored(self) -> int:
        """How often a step's completions are scored without a gradient."""
        return int(self.objective.beta > 0) + int(self.separate)

    @property
    def at_once(self) -> int:
        """Prompts in the sampler at a time."""
        return self.config.rollout.prompts_at_once or self.prompts

    @property
    def cap(self) -> int:
        """Tokens of the longest completion there can be."""
        return self.config.rollout.max_new_tokens

    def longest(self, mean: int) -> int:
        """Tokens of the longest completion of a step, for completions of `mean` tokens."""
        return min(round(LONGEST * mean), self.cap)

    def row_sizes(self, mean: int) -> RowSizes:
        """A learner's row for completions of `mean` tokens, without frames: features are computed before."""
        longest = self.longest(mean)
        entries = min(self.per_row * longest, self.branches * mean)
        needed = RowSizes(self.prompt.length, self.per_row, longest, 0, 0, entries)
        return dataclasses.replace(buckets(self.config, self.model).sizes(needed), slots=self.per_row)

    def with_settings(self, settings: Mapping[str, int]) -> GrpoJob:
        """The job with other values of dotted keys."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.update_from_flattened_dict(dict(settings))
        return dataclasses.replace(self, config=config)


def plan_job(config: ml_collections.ConfigDict, lengths: Lengths | None = None) -> GrpoJob:
    """The job of a config. No file but the model's config.json is read.

    Raises:
      PlanError: no model is named, or completions cannot be laid out in rows or parts of the sampler.
      ModelConfigError: its config.json is unusable.
      ValueError: the objective's settings do not go together.
    """
    model, lengths, c = model_config(config), lengths or Lengths(), config.rollout
    frames, tokens, patches = clip_shape(config, model)
    length = min(tokens + lengths.text, config.data.max_tokens)
    sizes = buckets(config, model).sizes(RowSizes(length, 1, 1, frames, patches, 1))
    prompt = PromptSizes(sizes.prefix, sizes.frames, sizes.frame_patches)
    try:
        objective = objective_of(config)
    except ValueError as error:
        raise PlanError(str(error)) from None
    if c.completions % (config.learner.completions_per_row or c.completions):
        raise PlanError(
            f"rollout.completions = {c.completions} cannot be laid out {config.learner.completions_per_row} to a row: "
            "change learner.completions_per_row"
        )
    if c.prompts_at_once and c.prompts % c.prompts_at_once:
        raise PlanError(f"rollout.prompts = {c.prompts} cannot be sampled {c.prompts_at_once} at a time")
    if lengths.completion > c.max_new_tokens:
        raise PlanError(
            f"--plan: completion={lengths.completion} is longer than rollout.max_new_tokens = {c.max_new_tokens} allows"
        )
    lengths = dataclasses.replace(lengths, completion=lengths.completion or min(EXPECTED, c.max_new_tokens))
    return GrpoJob(config, model, objective, prompt, lengths)


def buckets(config: ml_collections.ConfigDict, model: ModelConfig) -> RowBuckets:
    """The paddings of a run (`grpo.job.model_side`), with the largest clip as the full one."""
    frames, _, patches = clip_shape(config, model)
    lengths = dict(prefix=tuple(config.data.prefix_buckets), length=tuple(config.rollout.buckets))
    area = model.vision.merge_size**2
    return RowBuckets(**lengths, merge_area=area, full_frames=frames, full_frame_patches=patches)


def decode_rungs(ladder: Ladder, chunk: int, longest: int, cap: int) -> list[tuple[int, int]]:
    """(positions of a branch's cache, decode steps with a cache of that size) until completions of `longest` tokens.

    The first token comes from the prefill and the last one is never fed back: `longest - 1` steps in all.
    """
    most = max(cap - 1, 1)
    found: dict[int, int] = {}
    for step in range(1, longest, chunk):
        slots = ladder.slots(min(step + chunk - 1, most), most)
        found[slots] = found.get(slots, 0) + min(chunk, longest - step)
    return list(found.items())


def division_problem(job: GrpoJob, shape: Mapping[str, int]) -> str:
    """Why the rows of a step cannot be split over a mesh of that shape; '' where they can."""
    shards = shape["data"] * shape["fsdp"]
    if job.rows % job.parts or (job.rows // job.parts) % shards:
        return (
            f"{job.rows} rows of {job.per_row} completions cannot be split into {job.parts} micro-batch(es) over "
            f"{shards} devices (mesh data x fsdp)"
        )
    if shape["fsdp"] > 1 and not job.config.rollout.tensor:
        return "with mesh.fsdp the sampler needs a mesh of its own (rollout.tensor)"
    return ""


def mesh_shape(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The axes of a mesh over so many devices, -1 resolved. Raises MeshError where they do not fit."""
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    known = 1
    for size in shape.values():
        known *= size if size != -1 else 1
    open_axes = [axis for axis, size in shape.items() if size == -1]
    if len(open_axes) > 1 or min(abs(size) for size in shape.values()) < 1 or devices % known:
        raise MeshError(f"mesh {shape} does not fit {devices} devices")
    for axis in open_axes:
        shape[axis], known = devices // known, devices
    if known != devices:
        raise MeshError(f"mesh {shape} needs {known} devices, there are {devices}")
    return shape


def sampling_tensor(job: GrpoJob, devices: int) -> int:
    """Devices that share the weights while sampling: so many that none of the others has filled-up rows only.

    Bounded by the key heads, over which the caches are split.
    """
    heads = job.model.text.num_kv_heads
    sizes = [t for t in _divisors(heads) if devices % t == 0]
    return next((t for t in sizes if devices // t <= job.at_once), sizes[-1])


def candidates(job: GrpoJob, devices: int) -> Iterator[dict[str, Any]]:
    """Settings (dotted keys) under which the rows of a step can be split over the devices, best first.

    Best is: little tensor parallelism in the learner, few keys that differ from the config, few tokens computed (a
    prompt once for many completions), few micro-batches.
    """
    found, share, at = [], sampling_tensor(job, devices), job.config
    for tensor in _divisors(job.model.text.num_kv_heads):
        if devices % tensor:
            continue
        for fsdp in _divisors(devices // tensor):
            data = devices // tensor // fsdp
            other = 0 if fsdp == 1 and tensor == share else share
            mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "rollout.tensor": other}
            for per_row in _divisors(job.branches):
                rows = job.prompts * job.branches // per_row
                for parts in _divisors(rows):
                    if (rows // parts) % (data * fsdp):
                        continue
                    more = {"learner.completions_per_row": per_row, "train.accumulation": parts}
                    tokens = rows * (job.prompt.length + per_row * job.cap)
                    settings = mesh | more
                    changed = len(differences(settings, at, devices))
                    found.append(((tensor, changed, tokens, parts, -fsdp), settings))
    return (settings for _, settings in sorted(found, key=lambda x: x[0]))


def differences(settings: Mapping[str, int], config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """Those of the settings that have to be set because the config comes to something else on so many devices."""
    try:
        shape = mesh_shape(dict(config.mesh), devices)
    except MeshError:
        shape = {}
    now = {f"mesh.{axis}": size for axis, size in shape.items()}
    now["rollout.tensor"] = config.rollout.tensor
    now["train.accumulation"] = config.train.accumulation
    now["learner.completions_per_row"] = config.learner.completions_per_row or config.rollout.completions
    rest = {name: value for name, value in settings.items() if now.get(name) != value}
    if config.mesh.data == -1:  # takes what the other axes leave
        rest.pop("mesh.data", None)
    return rest


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
