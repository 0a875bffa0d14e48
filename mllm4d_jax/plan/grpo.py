"""Reinforcement learning on a topology: the programs of a step, what each of them has to do, where the time goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.programs import ChunkInputs, KeyNumbers
from mllm4d_jax.grpo.batch import RolloutBatch
from mllm4d_jax.grpo.learner import PromptEncoder, PromptFeatures, scores_first
from mllm4d_jax.grpo.settings import completions_per_row
from mllm4d_jax.grpo.setup import make_learner, make_sampler, sampling_weights
from mllm4d_jax.models.flops import Tuning, Work, padded_work, pass_bytes, passes, step_flops
from mllm4d_jax.parallel.mesh import own_part, process_count
from mllm4d_jax.parallel.place import local_bytes, placed, placed_rows, repeated
from mllm4d_jax.parallel.rules import batch_shards, replicated
from mllm4d_jax.plan.compile import Compiled, Phase, Phases, PhaseWork, held_by, results_of
from mllm4d_jax.plan.job import GrpoJob
from mllm4d_jax.plan.memory import APART, COPY
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.rows.completion_rows import CompletionRows, PromptBatch, assign_rows, completion_rows
from mllm4d_jax.run.build import build

SAMPLING = ("prefill", "growth", "decode")
SAMPLED = "sampler's trainable"
# Kinds of memory that do not grow with the prompts of a step.
FIXED = ("frozen", COPY, "trainable", SAMPLED, APART, "optimiser", "reference", "gradient", "layout", "program")


class GrpoPhases:
    """The programs of a run on the devices of a topology.

    Attributes:
      job: what is planned.
      parts: of the learner; mesh, sampler_mesh: of learner and sampler. Of several hosts each has a sampler of its own,
        and one of them is planned.
      sampled: trees that the sampler is given.
      ladder: sizes of the sampler's arrays.
      lengths: tokens of a mean completion -> of a step's longest; the expected ones first.
      notes: what differs from the config.
    """

    def __init__(
        self, job: GrpoJob, devices: Sequence[jax.Device], note: str = "", host: Sequence[jax.Device] = ()
    ) -> None:
        """Raises MeshError where the configured meshes do not fit the devices.

        Args:
          note: as of `memory.choose`.
          host: see `Topology`; the sampler is compiled for these in the place of those of the first host.
        """
        self.notes = (note,) if note else ()
        means = dict.fromkeys((job.lengths.completion, job.rollout.max_new_tokens))
        self.lengths = {mean: job.longest(mean) for mean in means}
        self.parts = build(job.config, devices=devices, abstract=True)
        self.job = job = dataclasses.replace(job, hosts=process_count(self.parts.mesh))
        weights = sampling_weights(self.parts, self.parts.trainable, partial(_host_part, host))
        self.mesh, self.sampler_mesh, self.sampled = self.parts.mesh, weights.mesh, weights.of(self.parts.trainable)
        banned, rate = tuple(sorted(job.shape.visual_token_ids)), job.rollout.temperature
        # Which token ends a text, and which are never drawn, makes no program larger.
        self._options = SamplingOptions(rate, eos_ids=(0,), banned_ids=banned, require_exact=True)
        self._learner = make_learner(self.parts, self.parts.trainable, self.parts.opt_state, self._options)
        self._sampler = make_sampler(job.config, weights)
        self._encoder = PromptEncoder(weights.graphdef, weights.mesh) if job.hosts > 1 else None
        self.ladder = self._sampler.ladder
        # How often a step's completions are scored without a gradient: by the reference, by the policy.
        self.separate = scores_first(job.config.train.accumulation, job.config.objective.iterations)
        self.scored = int(job.reference) + int(self.separate)

    def held(self, *, sampling: bool) -> dict[str, int]:
        """Return the bytes on a device of what is there whatever runs, by kind."""
        kinds = held_by(self.parts)
        if self.job.reference:
            kinds["reference"] = kinds["trainable"]
        if self.job.rollout.tensor:
            kinds[COPY] = local_bytes(self.sampled[1])
            if sampling:
                kinds[SAMPLED] = local_bytes(self.sampled[0])
        return kinds

    def phases(self) -> Phases:
        """Yield the programs in the order of a step; what needs the result of one that does not fit is left out."""
        job, parts, lower = self.job, self.parts, self._learner.lower
        held, encode = self.held(sampling=False), self._encoding()
        features = yield encode
        if features is None:
            return
        yield from self._sampling(features)
        for mean in sorted(self.lengths, reverse=True):
            yield from self._learning(features, mean)
        grads, number = self._gradient(), _everywhere(np.float32(0), self.mesh)
        program = partial(lower, "finish", parts.trainable, parts.opt_state, grads, number, number)
        there = held | {"features": local_bytes(features), "gradient": local_bytes(grads)}
        size = job.row_sizes(job.rollout.max_new_tokens).layout.size
        yield Phase("optimiser", "optimiser", program, there, rows=0, size=size)

    def _encoding(self) -> Phase:
        """The frames of all prompts; of several hosts, each sees those of its own ones."""
        job, parts, own = self.job, self.parts, self.job.rollout.prompts // self.job.hosts
        mesh, clip = self.sampler_mesh if self._encoder else self.mesh, job.shape.collate([[]], job.sizes).inputs.vision
        vision = placed_rows(repeated(clip, own), mesh)
        if self._encoder:
            program = partial(self._encoder.lower, self.sampled, vision, own)
        else:
            program = partial(self._learner.lower, "encode", parts.trainable, parts.frozen, vision, own)
        there = self.held(sampling=self._encoder is not None) | {"batch": local_bytes(vision)}
        rows = -(-own // batch_shards(mesh))
        return Phase("vision encode", "encode", program, there, rows, job.sizes.prefix, job.rollout.prompts)

    def _sampling(self, features: PromptFeatures) -> Phases:
        """Prefill; a chunk with the first cache; the last growth of the cache; a chunk with the largest."""
        job, mesh, options, lower = self.job, self.sampler_mesh, self._options, self._sampler.lower
        together = batch_shards(mesh)  # prompts that a host prefills at a time
        filled, first = job.sampled(together * job.hosts) // job.hosts, min(together, job.rollout.prompts // job.hosts)
        numbers, entries = (
            np.zeros((together, job.rollout.completions), np.int32),
            np.zeros((filled, job.width), np.int32),
        )
        keys, own_keys = (KeyNumbers(np.uint32(0), n.astype(np.uint32), n) for n in (numbers, entries))
        feed = ChunkInputs(entries, entries > 0, entries, own_keys, entries, None, entries, np.int32(0))
        keys, feed = _everywhere((keys, feed), mesh)
        flat = jax.eval_shape(lambda f: PromptFeatures(f.merged[:first], f.deepstack[:, :first]).flat(), features)
        flat, inputs = placed_rows((flat, _prompts(job, together).inputs), mesh)
        rungs = [slots for slots, _ in job.rungs(self.ladder, job.rollout.max_new_tokens)] or [1]
        prompts, caches = self._caches(filled, {rungs[0], *rungs[-2:]})
        there = self.held(sampling=True)
        moved = mesh is not self.mesh and self._encoder is None
        there["features"] = local_bytes(features) + moved * local_bytes(flat)
        there["prompt cache"] = local_bytes(prompts)
        form = self._sampler.form(self.sampled)
        layers = None
        if form != "stacked":
            layers = results_of(lower("layers", self.sampled, kernels=form == "kernels").compile())
        same = dict(size=job.sizes.prefix, prompts=filled * job.hosts)
        decoding = {APART: local_bytes(layers)} if layers else {}
        held = there | {"branch cache": local_bytes(caches[rungs[0]])}
        if job.at_once < job.rollout.prompts:  # the next ones come while others decode, as long as they can be
            held = there | decoding | {"branch cache": local_bytes(caches[rungs[-1]])}
        named = dict(branches=job.rollout.completions, options=options, apart=form != "stacked")
        program = partial(lower, "start", self.sampled, inputs, flat, keys, None, **named)
        held["batch"] = local_bytes(inputs)
        if (yield Phase("prefill", "prefill", program, held, rows=1, **same)) is None:
            return
        same["rows"], there = filled // together, there | decoding
        for slots in dict.fromkeys(rungs[:1] + rungs[-1:]):
            if slots != rungs[0]:
                cache = caches[rungs[-2]]
                program = partial(lower, "grow_branches", cache, width=job.width, slots=slots)
                held = there | {"branch cache": local_bytes(cache)}
                yield Phase(f"growth to {slots} positions", "growth", program, held, **same)
            cache = caches[slots]
            named = dict(own=cache, feed=feed, layers=layers, options=options, chunk=self._sampler.chunk)
            program = partial(lower, "decode", self.sampled, prompts, **named)
            held = there | {"branch cache": local_bytes(cache)}
            yield Phase(f"decode, {slots} positions", "decode", program, held, **same)

    def _caches(self, filled: int, rungs: Iterable[int]) -> tuple[Any, dict[int, Any]]:
        """The prompts' cache, and the branches' by the positions of each."""
        prompts, caches, mesh, apart = None, {}, self.sampler_mesh, self._sampler.form(self.sampled) != "stacked"
        for slots in rungs:
            named = dict(shape=(filled, self.job.width, slots), prompt=self.job.sizes.prefix, apart=apart)
            program = self._sampler.lower("empty", self.sampled, **named)
            # Nothing says where the zeros of one device lie, and JAX puts them on this process's.
            made = _everywhere(program.out_info, mesh) if mesh.size == 1 else results_of(program.compile())
            prompts, caches[slots] = made
        return prompts, caches

    def _learning(self, features: PromptFeatures, mean: int) -> Phases:
        """Log-probs without and with a gradient, of one micro-batch with completions of `mean` tokens."""
        job, c, lower = self.job, self.job.rollout, self._learner.lower
        trainable, frozen, grads = self.parts.trainable, self.parts.frozen, self._gradient()
        held = self.held(sampling=False) | {"features": local_bytes(features)}
        rows = learner_rows(job, mean)
        if self._encoder:  # each row's features are taken on its host, for all micro-batches at once
            features, rows = self._taken(features, len(rows.completions)), rows._replace(prompts=None)
            held["features"] += job.config.train.accumulation * local_bytes(features)
        rows = placed_rows(rows, self.mesh)
        numbers = np.zeros((c.prompts * c.completions, rows.places.shape[-1]), np.float32)
        batch = RolloutBatch(
            tokens=numbers.astype(np.int32),
            mask=numbers,
            groups=numbers[:, 0].astype(np.int32),
            old_logprobs=numbers,
            rewards=numbers[:, 0],
            truncated=numbers[:, 0] > 0,
            reference_logprobs=numbers if job.reference else None,
        )
        batch, scores = _everywhere((batch, numbers), self.mesh)
        begun = lower("begin", batch, scores if self.separate else None).out_info
        batch, totals, *_ = _everywhere(begun, self.mesh)
        held["batch"] = job.config.train.accumulation * local_bytes(rows) + local_bytes(batch)
        count, size = -(-rows.places.shape[0] // batch_shards(self.mesh)), rows.inputs.layout.size
        same = dict(rows=count, size=size, prompts=c.prompts, mean=mean)
        if self.scored:
            program = partial(lower, "score", scores, trainable, frozen, features, rows)
            yield Phase(f"score, completions of {mean}", "score", program, held, **same)
        program = partial(lower, "add", grads, trainable, frozen, features, rows, batch, totals)
        held = held | {"gradient": local_bytes(grads)}
        yield Phase(f"gradient, completions of {mean}", "gradient", program, held, **same)

    def _taken(self, features: PromptFeatures, rows: int) -> PromptFeatures:
        """Features of so many rows, each with those of its prompt, on the devices of all hosts."""
        shape, dtype = (rows, *features.merged.shape[1:]), features.merged.dtype
        deep = (features.deepstack.shape[0], *shape)
        taken = PromptFeatures(jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(deep, dtype))
        return placed_rows(taken, self.mesh)

    def _gradient(self) -> Any:
        return jax.tree.map(lambda x: placed(x.update(dtype=jnp.float32), x.sharding), self.parts.trainable)

    def calls(self, mean: int) -> Iterator[PhaseWork]:
        """Yield what each phase does in a step with completions of `mean` tokens."""
        job, text, c = self.job, self.job.model.text, self.job.config
        data, tensor = batch_shards(self.sampler_mesh) * job.hosts, self.sampler_mesh.shape["tensor"]
        flops, rows = program_flops(job, self.parts.tuning, mean, data), job.sampled(data)
        tower = (self.sampled[1] if self._encoder else self.parts.frozen)["vision"]
        yield PhaseWork("vision", "encode", 1, flops["encode"], float(local_bytes(tower)))
        prefilled = pass_bytes(text, job.item, tensor, job.sizes.prefix)
        yield PhaseWork("prefill", "prefill", -(-job.rollout.prompts // data), flops["prefill"], prefilled)
        rungs = job.decode_rungs(self.ladder, mean)
        split = data * (tensor if text.num_kv_heads % tensor == 0 else 1)
        # Every step reads the weights, the prompts' cache and the whole cache of the branches, used or not.
        fixed = self.decoded() + job.cache_bytes(rows, job.sizes.prefix) / split
        each = job.cache_bytes(rows, 1, job.width) / split
        read = float(sum(steps * (fixed + each * slots) for slots, steps in rungs))
        work = sum(steps * decode_flops(job, self.parts.tuning, slots, data) for slots, steps in rungs)
        yield PhaseWork("decode", "decode", 1, work, read, sum(steps for _, steps in rungs))
        own = job.rows / batch_shards(self.mesh) * job.row_sizes(mean).layout.size
        learned, micro = pass_bytes(text, job.item, self.mesh.shape["tensor"], own), c.train.accumulation
        yield PhaseWork("score", "score", micro * self.scored, flops["score"], learned)
        back = passes(c.model.remat) * learned
        yield PhaseWork("update", "gradient", micro * c.objective.iterations, flops["gradient"], back)
        kinds = held_by(self.parts)
        yield PhaseWork(
            "update", "optimiser", c.objective.iterations, 0.0, 2.0 * (kinds["trainable"] + kinds["optimiser"])
        )

    def facts(self) -> dict[str, Any]:
        """Return what was planned with."""
        return dict(
            sampler_mesh=dict(self.sampler_mesh.shape),
            hosts=self.job.hosts,
            prompts=self.job.rollout.prompts,
            completions=self.job.rollout.completions,
            completions_per_row=completions_per_row(self.job.config),
            accumulation=self.job.config.train.accumulation,
        )

    def largest(self, compiled: Sequence[Compiled], limit: int, compile_other: None) -> tuple[int, str]:
        """Return the most prompts of a step and how certain they are, see `TopologyPlan`; nothing is searched for.

        Arguments as of `SftPhases.largest`.
        """
        return largest_prompts(self.job, compiled, limit, batch_shards(self.mesh)), "estimated"

    def decoded(self) -> int:
        """Return the bytes of weights that a decode step reads on a device: no tower, no embedding unless tied."""
        kept = []
        for tree in self.sampled:
            parts = {name: part for name, part in tree.items() if name != "vision"}
            if "embed" in parts.get("text", {}) and not self.job.model.tied:
                parts["text"] = {name: part for name, part in parts["text"].items() if name != "embed"}
            kept.append(parts)
        return local_bytes(kept)


def _host_part(host: Sequence[jax.Device], mesh: Mesh) -> Mesh:
    """Return the first host's part of a mesh, with the devices of `host`, if there are any, in their places."""
    own = own_part(mesh)
    if own is mesh or not host:
        return own
    places = {device.id: n for n, device in enumerate(sorted(own.devices.flat, key=lambda d: d.id))}
    return Mesh(np.asarray([host[places[d.id]] for d in own.devices.flat]).reshape(own.devices.shape), own.axis_names)


def program_flops(job: GrpoJob, tuning: Tuning, mean: int, data: int) -> dict[str, float]:
    """Return the FLOPs of one run of each program over all devices, with recomputation, by kind.

    They are for completions of `mean` tokens and a sampler whose prompts are split over `data` devices.
    """
    p, sizes = job.sizes, job.row_sizes(mean)
    patches = job.rollout.prompts * p.frames * p.frame_patches
    vision = Work(0, 0, patches, patches * p.frame_patches, patches * p.frame_patches, 0)
    prompts = Work(data * p.prefix, data * p.prefix * (p.prefix + 1) // 2, 0, 0, 0, data)
    learned = padded_work(sizes.layout, job.rows, 0, 0, job.rows * sizes.supervised)
    encode, prefill, update = (step_flops(job.model, work, tuning).total for work in (vision, prompts, learned))
    return dict(encode=encode.forward, prefill=prefill.forward, score=update.forward, gradient=update.hardware)


def decode_flops(job: GrpoJob, tuning: Tuning, slots: int, data: int) -> float:
    """Return the FLOPs of a token of each branch with a cache of so many positions. Arguments as `program_flops`."""
    branches = job.sampled(data) * job.width
    work = Work(branches, branches * (job.sizes.prefix + slots), 0, 0, 0, branches)
    return step_flops(job.model, work, tuning).total.forward


def learner_rows(job: GrpoJob, mean: int) -> CompletionRows:
    """Return a micro-batch, laid out as the run does it, padded for completions of `mean` tokens."""
    sizes, lengths = job.row_sizes(mean), np.ones((job.rollout.prompts, job.rollout.completions), np.int32)
    rows = assign_rows(lengths, completions_per_row(job.config), job.config.train.accumulation)[0]
    tokens, prompts = np.zeros((lengths.size, 1), np.int32), _prompts(job, job.rollout.prompts)
    return completion_rows(prompts, rows, tokens, lengths.reshape(-1), slot=sizes.length, entries=sizes.supervised)


def _prompts(job: GrpoJob, count: int) -> PromptBatch:
    """Prompts of the planned size, without frames, as sampler and learner take them."""
    tokens, ones = np.zeros((count, job.sizes.prefix), np.int32), np.ones(count, np.int32)
    positions = np.zeros((3, *tokens.shape), np.int32)
    return PromptBatch(ModelInputs(tokens, positions, tokens, tokens, None), ones, ones, 0)


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    """Return the shapes of arrays that every device holds whole."""
    return jax.tree.map(lambda x: placed(x, replicated(mesh)), tree)


def largest_prompts(job: GrpoJob, phases: Sequence[Compiled], limit: int, shards: int) -> int:
    """Return the most prompts of a step for which every phase is reckoned to fit.

    Bytes of weights, of what is trained and of the program stay, all else grows with the prompts; phases of a sampler
    that takes a few of them at a time (rollout.prompts_at_once) do not grow. The rows have to divide among
    micro-batches and devices.
    """
    most, c = math.inf, job.config
    for p in phases:
        prompts = p.phase.prompts
        if prompts and not (p.phase.kind in SAMPLING and c.rollout.prompts_at_once):
            fixed = sum(n for kind, n in (p.memory or p.phase.held).items() if kind in FIXED)
            most = min(most, prompts * (limit - fixed) / max(p.needed - fixed, 1))
    each = c.train.accumulation * shards
    rows = job.rollout.completions // completions_per_row(c)
    step = math.lcm(each // math.gcd(rows, each), job.hosts)
    return max(0, math.floor(most / step) * step) if math.isfinite(most) else 0
