"""What a plan of reinforcement learning compiles: arguments of its programs against those of a run."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.generate.inputs import Prompts
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.stream import Limits
from mllm4d_jax.grpo.learner import PromptFeatures
from mllm4d_jax.grpo.rollout import Rollouts
from mllm4d_jax.grpo.setup import make_learner, make_sampler, sampling_weights
from mllm4d_jax.grpo.task import rows_of
from mllm4d_jax.models.split import merge_model
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel.place import place_rows
from mllm4d_jax.parallel.rules import replicated
from mllm4d_jax.plan import grpo as plan_grpo
from mllm4d_jax.plan import memory as reckon
from mllm4d_jax.plan.grpo import GrpoPhases
from mllm4d_jax.rows.completion_rows import collate_prompts, needed_prompt_sizes
from mllm4d_jax.run.build import build
from tests.grpo.learner_cases import parts, prompt, prompts
from tests.plan.grpo_jobs import job_of

OPTIONS = SamplingOptions(1.0, eos_ids=(5,))


def shapes(tree):
    """Shape, dtype and placement of every array; numbers as they are."""
    return jax.tree.map(lambda x: x if isinstance(x, int) else (x.shape, str(x.dtype), x.sharding), tree)


@pytest.mark.parametrize("tensor", [0, 2])
def test_the_planned_trees_are_those_of_a_run(config, tensor):
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor = (8, 1, 0) if not tensor else (2, 4, tensor)
    programs = GrpoPhases(job_of(config), jax.devices()[:8])
    real = build(config, devices=jax.devices()[:8])
    for name in ("trainable", "frozen", "opt_state"):
        assert shapes(getattr(programs.parts, name)) == shapes(getattr(real, name))
    sampled = sampling_weights(real, real.trainable).of(real.trainable)
    assert shapes(programs.sampled) == shapes(sampled)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(sampled[1]))
    assert programs.held(sampling=True).get(reckon.COPY, 0) == (on_one if tensor else 0)
    assert programs.held(sampling=False)["reference"] == programs.held(sampling=False)["trainable"]


def planned_arguments(planned: GrpoPhases, features: PromptFeatures) -> dict[str, tuple]:
    """The arguments of each kind of program, nothing compiled; `features` lie as a run has them."""
    cache = jax.ShapeDtypeStruct((1,), np.int8, sharding=replicated(planned.mesh))
    phases, sent, found = planned.phases(), None, {}
    planned._caches = lambda filled, rungs: (cache, dict.fromkeys(rungs, cache))
    while True:
        try:
            phase = phases.send(sent)
        except StopIteration:
            return found
        found.setdefault(phase.kind, (phase.lower.args[1:], phase.lower.keywords))
        sent = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), features)
        sent = sent if phase.kind == "encode" else (cache,)


def recorded(owner, results: dict, hidden: str = "") -> dict[str, tuple]:
    """Puts functions in the place of compiled ones; gives the dict in which they note their newest arguments."""
    calls = {}

    def noting(name, result):
        def call(*args, **named):
            calls[name] = args, named
            return result(*args)

        return call

    for name, result in results.items():
        setattr(owner, hidden + name, noting(name, result))
    return calls


class Reached(Exception):
    """The program that was waited for was called."""


def drawn(prompts: int, branches: int, length: int) -> Rollouts:
    """Completions that all reach the cap."""
    count = prompts * branches
    return Rollouts(
        step=0,
        policy_step=0,
        positions=tuple(range(prompts)),
        position=prompts,
        rejected=0,
        tokens=np.ones((count, length), np.int32),
        lengths=np.full(count, length, np.int32),
        logprobs=np.zeros((count, length), np.float32),
        finish=("length",) * count,
        texts=("",) * count,
        rewards=({"total": 1.0}, {"total": 0.0}) * (count // 2),
        seconds={},
        counts={},
    )


def sampler_calls(config, real, examples, sizes, features) -> dict[str, tuple]:
    """What a sampler hands to its compiled functions for the first prompts (room for two), up to the first decode."""
    weights = sampling_weights(real, real.trainable)
    sampler = make_sampler(config, weights)
    size = sampler.ladder.shards
    first = slice(0, size)

    def stop(*args):
        raise Reached

    zeros = np.zeros((size, 8), np.int32)
    cache = types.SimpleNamespace(visible=np.zeros((2, sizes.prefix)))
    made = dict(start=lambda *args: (cache, None, zeros, zeros[..., None], zeros[..., None].astype(np.float32)))
    made |= dict(empty=lambda *args: (cache, "own"), insert=lambda *args: (cache, "own"), decode=stop)
    calls = recorded(sampler, made)
    some = collate_prompts(examples[first], sizes, real.shape.geometry, real.shape.visual_token_ids)
    own = PromptFeatures(features.merged[first], features.deepstack[:, first]).flat()
    prompts = [Prompts.checked(some.inputs._replace(vision=None), range(size), 8, 32, own)] * (2 // size)
    with pytest.raises(Reached):
        list(sampler.stream(weights.of(real.trainable), prompts, options=OPTIONS, limits=Limits(2)))
    return calls


def learner_calls(config, real, batch, features) -> tuple[dict[str, tuple], int]:
    """What a learner hands to its compiled functions in an update, and in how many micro-batches."""
    learner, rollouts = make_learner(real, real.trainable, real.opt_state, OPTIONS), drawn(4, 8, 32)
    made = dict(encode=lambda *args: features, score=lambda whole, *args: whole, begin=learner._begin)
    made |= dict(zeros=lambda tree: tree, add=lambda grads, *args: (grads, 0.0, {}, 0.0))
    made |= dict(finish=lambda trainable, opt_state, *args: (trainable, opt_state, None))
    calls = recorded(learner, made, hidden="_")
    learner.encode(real.trainable, real.frozen, batch.inputs.vision, 4)
    own = dataclasses.replace(batch, inputs=batch.inputs._replace(vision=None))
    length, rows = rows_of(config, real.shape, types.SimpleNamespace(rollouts=rollouts, batch=own))
    learner.update(
        real.trainable, real.opt_state, real.frozen, features, rows, rollouts.batch(length), reference=real.trainable
    )
    return calls, len(rows)


@pytest.mark.parametrize(
    ("mesh", "tensor", "per_row", "micro"), [((2, 1), 0, 0, 1), ((1, 2), 2, 4, 2)], ids=["whole", "parts"]
)
def test_the_planned_programs_take_the_arguments_of_a_run(config, mesh, tensor, per_row, micro):
    """Shapes, dtypes and placement of everything that sampler and learner hand to a jitted function."""
    (config.mesh.data, config.mesh.fsdp), config.rollout.tensor = mesh, tensor
    config.learner.completions_per_row, config.train.accumulation = per_row, micro
    config.rollout.max_new_tokens, config.rollout.buckets, config.rollout.prompts_at_once = 32, (32,), 2
    devices, rng = jax.devices()[:2], np.random.default_rng(0)
    real = build(config, devices=devices)
    examples = [prompt(real.sizes, f"p{i}", rng, grid=Grid("video", 1, 4, 4), words=6) for i in range(4)]
    sizes = real.shape.sizes(needed_prompt_sizes(examples))
    batch = collate_prompts(examples, sizes, real.shape.geometry, real.shape.visual_token_ids)
    merged = np.zeros((4, batch.features, real.sizes.text.hidden_size), np.float32)
    taps = np.zeros((len(real.sizes.vision.deepstack), *merged.shape), np.float32)
    features = place_rows(PromptFeatures(merged, taps), real.mesh)
    programs = GrpoPhases(dataclasses.replace(job_of(config), sizes=sizes), devices)
    planned = planned_arguments(programs, features)

    calls = sampler_calls(config, real, examples, sizes, features)
    (args, named), (wanted, static) = calls["start"], planned["prefill"]
    assert shapes(args) == shapes(wanted) and named["branches"] == static["branches"] == 8
    (args, named), (wanted, static) = calls["decode"], planned["decode"]
    assert shapes(args[0]) == shapes(wanted[0]) and named["chunk"] == static["chunk"]
    assert shapes(named["feed"]) == shapes(static["feed"])

    calls, count = learner_calls(config, real, batch, features)
    assert count == micro
    for kind, name in (("encode", "encode"), ("score", "score"), ("gradient", "add"), ("optimiser", "finish")):
        args, wanted = calls[name][0], planned[kind][0]
        if name == "finish":  # the loss is added up from what was made up here
            args, wanted = args[:3], wanted[:3]
        assert jax.tree.structure(args) == jax.tree.structure(wanted), kind
        assert shapes(args) == shapes(wanted), kind


def test_features_from_devices_in_another_order(quick_compiles):
    """As on a TPU, where the meshes of learner and sampler do not list the devices alike."""
    config, graphdef, trainable, frozen, mesh = parts("qwen3_vl", 2)
    _, batch = prompts("qwen3_vl", 2)
    found = merge_model(graphdef, trainable, frozen).encode_vision(batch.inputs.vision)
    other = Mesh(mesh.devices[::-1], mesh.axis_names)
    assert [d.id for d in other.devices.flat] != [d.id for d in mesh.devices.flat]

    def put(mesh: Mesh) -> VisionFeatures:
        return jax.device_put(VisionFeatures(*map(np.asarray, found)), replicated(mesh))

    inputs = batch.inputs._replace(vision=None)
    how = dict(prompt_ids=[1, 2], branches=2, max_new_tokens=4, options=SamplingOptions())
    sampler = Sampler(graphdef, mesh, chunk=4)
    same, moved = (sampler.generate((trainable, frozen), inputs, features=put(m), **how) for m in (mesh, other))
    assert np.array_equal(same.tokens, moved.tokens) and np.array_equal(same.logprobs, moved.logprobs)


def test_of_several_hosts_each_has_a_sampler_of_its_own(config, monkeypatch):
    """Four devices as if they were of two hosts: what a run of two processes hands to its programs."""
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor = 1, 4, 2
    config.learner.completions_per_row, config.train.accumulation = 4, 2
    config.rollout.max_new_tokens, config.rollout.buckets, config.rollout.prompts_at_once = 32, (32,), 2
    devices = jax.devices()[:8]
    monkeypatch.setattr(plan_grpo, "process_count", lambda mesh: 2)
    monkeypatch.setattr(plan_grpo, "own_part", lambda mesh: Mesh(mesh.devices.reshape(-1, 1, 2)[:1], mesh.axis_names))
    programs = GrpoPhases(job_of(config), devices[:4], host=devices[6:])
    mesh, p = programs.sampler_mesh, programs.job.sizes
    assert list(mesh.devices.flat) == devices[6:] and dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 2}
    assert {d for x in jax.tree.leaves(programs.sampled) for d in x.sharding.device_set} == set(devices[6:])
    size = (2, p.frames * p.frame_patches // 4, programs.job.model.text.hidden_size)
    found = PromptFeatures(
        *(jax.ShapeDtypeStruct((*k, *size), np.float32, sharding=replicated(mesh)) for k in ((), (2,)))
    )
    planned = planned_arguments(programs, found)
    vision, prompts = planned["encode"][0]
    assert prompts == 2 and vision.patches.sharding.mesh == mesh and len(vision.patches) == 2 * p.frames
    (_, inputs, flat, *_), _ = planned["prefill"]
    assert len(inputs.tokens) == 1, "one of its two prompts at a time"
    assert flat.merged.shape[0] == size[1] and inputs.tokens.sharding.mesh == mesh
    _, _, _, taken, rows, batch, _ = planned["gradient"][0]
    # 4 prompts x 8 completions, 4 to a row, in two parts: 4 rows, each with the features of its prompt
    assert rows.prompts is None and rows.places.shape[:2] == (4, 4) and taken.merged.shape == (4, *size[1:])
    assert taken.merged.sharding.mesh == programs.mesh == rows.places.sharding.mesh and len(batch.mask) == 32
    once = {call.kind: call for call in programs.calls(32)}
    assert once["prefill"].times == 2 and programs.facts()["hosts"] == 2
