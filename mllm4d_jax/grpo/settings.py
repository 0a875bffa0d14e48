"""A config's rollout, reward and objective groups as the types that the code reads, and what cannot work among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import ml_collections

from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.generate.policy import SamplingOptions, banned_token_ids
from mllm4d_jax.grpo.presets import ObjectiveConfig, resolve_objective
from mllm4d_jax.parallel.mesh import MeshError, mesh_shape
from mllm4d_jax.qa.custom_rewards import RewardError, Rewards, load_rewards
from mllm4d_jax.run import preflight

_SEPARATOR = "::"
_UNSET = ("", -1.0)  # values of a key below `objective` that leave the preset's piece as it is


def objective_of(config: ml_collections.ConfigDict) -> ObjectiveConfig:
    """The objective that the config asks for. Raises ValueError for values that do not go together."""
    pieces = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    changed = {name: value for name, value in config.objective.items() if name in pieces and value not in _UNSET}
    if "dynamic_sampling" in changed:
        changed["dynamic_sampling"] = changed["dynamic_sampling"] == "on"
    preset = resolve_objective(config.objective.preset)
    return dataclasses.replace(preset, max_completion=config.rollout.max_new_tokens, **changed)


def rewards_of(config: ml_collections.ConfigDict) -> Rewards:
    """The rewards that the config names. Raises RewardError."""
    spec = {}
    for entry in config.reward.functions:
        name, separator, weight = str(entry).rpartition(_SEPARATOR)
        try:
            spec[name] = spec.get(name, 0.0) + float(weight)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise RewardError(f"reward.functions: {entry!r} is not of the form name::weight")
    return load_rewards(spec)


def sampling_of(config: ml_collections.ConfigDict, tokenizer: Tokenizer, vocab_size: int) -> SamplingOptions:
    """How completions are drawn that are learned from."""
    return SamplingOptions(
        temperature=config.rollout.temperature,
        eos_ids=tokenizer.eos_ids,
        stop=tuple(config.rollout.stop),
        banned_ids=banned_token_ids(tokenizer, vocab_size),
        pad_id=tokenizer.pad_id,
        require_exact=True,
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Look for everything a run needs. Raises PreflightError."""
    divisions = [*layout_problems(config), *division_problems(config, len(jax.devices()), jax.process_count())]
    preflight.refuse(config, [*_setting_problems(config), *divisions])


def _setting_problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    for load in (objective_of, rewards_of):
        try:
            load(config)
        except ValueError as error:
            yield str(error)
    c = config.rollout
    yield from preflight.bucket_problems("rollout.buckets", c.buckets, "rollout.max_new_tokens", c.max_new_tokens)
    yield from preflight.place_problems("eval.path =", config.eval.path, config.eval.root or config.data.root)


def completions_per_row(config: ml_collections.ConfigDict) -> int:
    """Return the completions of a learner's row."""
    return config.learner.completions_per_row or config.rollout.completions


def layout_problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    """What cannot be divided on any devices, one line each: completions of a prompt in rows."""
    c, per_row = config.rollout, completions_per_row(config)
    if c.completions % per_row:
        yield (
            f"rollout.completions = {c.completions} cannot be laid out {per_row} to a row: change "
            "learner.completions_per_row"
        )


def division_problems(config: ml_collections.ConfigDict, devices: int, hosts: int = 1) -> Iterator[str]:
    """What cannot be divided on so many devices, one line each: rows -> micro-batches -> devices of the mesh.

    Args:
      hosts: processes that have as many of the devices; each draws completions of its own prompts, on its own devices.
    """
    c = config.rollout
    try:
        shape = mesh_shape(dict(config.mesh), devices)
        if c.tensor:
            mesh_shape({"data": -1, "tensor": c.tensor}, devices)
    except MeshError as error:
        yield f"mesh: {error}"
        return
    local = devices // hosts
    for name, tensor in (("mesh.tensor", shape["tensor"]), ("rollout.tensor", c.tensor or 1)):
        if local % tensor:
            yield f"{name} = {tensor} spans several hosts, which have {local} devices each: make it divide {local}"
    if c.prompts % hosts:
        yield f"rollout.prompts = {c.prompts} cannot be divided evenly over {hosts} hosts: make it a multiple"
    if shape["fsdp"] > 1 and not c.tensor:
        yield (
            f"mesh.fsdp = {shape['fsdp']} would gather all weights for every sampled token: set rollout.tensor to "
            "the number of devices that share the weights while sampling"
        )
    if c.completions % completions_per_row(config):
        return  # a layout problem
    rows, parts = c.prompts * (c.completions // completions_per_row(config)), config.train.accumulation
    shards = shape["data"] * shape["fsdp"]
    if rows % parts or (rows // parts) % shards:
        yield (
            f"rollout.prompts = {c.prompts} make {rows} rows, which cannot be split into train.accumulation = {parts} "
            f"micro-batches over {shards} devices (mesh data x fsdp): change rollout.prompts or "
            "learner.completions_per_row"
        )
