"""The programs of a step on shapes alone: compiled for devices that are not here, with what else is in their memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.sampler import ChunkInputs, KeyNumbers, Sampler
from mllm4d_jax.generate.weights import sampling_mesh
from mllm4d_jax.grpo.batch import RolloutBatch
from mllm4d_jax.grpo.learner import Learner, PromptFeatures
from mllm4d_jax.models.flops import Tuning
from mllm4d_jax.models.split import split_model
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.rules import batch_sharding, batch_shards, placed, replicated, row_shardings
from mllm4d_jax.plan.compile import Compiled, compile_program, whole_row
from mllm4d_jax.plan.grpo_job import GrpoJob, decode_rungs
from mllm4d_jax.plan.grpo_reckon import COPY, ladder, rows_of_sampler
from mllm4d_jax.plan.step import abstract_batch, abstract_model, abstract_optimizer, local_bytes
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.rows.completion_rows import CompletionRows
from mllm4d_jax.run.build import tuning

SAMPLING = ("prefill", "growth", "decode")
# Kinds of memory that do not grow with the prompts of a step.
FIXED = ("weights", COPY, "adapter", "sampler's adapter", "optimiser", "reference", "gradient", "layout", "program")
# Which token ends a text, and which are never drawn, makes no program larger.
_END, _PAD = 0, 0


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program of a step.

    Attributes:
      name: for people.
      kind: "encode", "prefill", "growth", "decode", "score", "gradient" or "optimiser".
      compiled: what its compilation told; its memory is of everything on a device while it runs, by kind. `rows` are
        prompts of the sampler, or rows of the learner, on a device.
      held: bytes on a device by kind, apart from what the program itself makes.
      prompts: how many it is for, over all devices (filled-up rows of the sampler count); 0 where it does not matter.
      mean: tokens of the completions it is for, 0 for any.
    """

    name: str
    kind: str
    compiled: Compiled
    held: dict[str, int]
    prompts: int = 0
    mean: int = 0

    @property
    def sampling(self) -> bool:
        return self.kind in SAMPLING


class Programs:
    """The shapes of a run on the devices of a topology, and its programs.

    Attributes:
      job: what is planned.
      mesh, sampler_mesh: of the learner and of the sampler.
      tuning: for the FLOP count.
      read: bytes of weights that a decode step reads on a device of the sampler.
      vision: bytes of the vision tower on a device of the learner.
    """

    def __init__(self, job: GrpoJob, devices: Sequence[jax.Device]) -> None:
        """
        Raises:
          MeshError: the configured meshes do not fit the devices.
        """
        self.job, c = job, job.config
        self.mesh = make_mesh(dict(c.mesh), devices)
        self.sampler_mesh = sampling_mesh(self.mesh, c.rollout.tensor)
        patterns = tuple(c.train.trainable)
        model = abstract_model(c, job.model, self.mesh)
        graphdef, self._trainable, self._frozen = split_model(model, patterns)
        self.tuning: Tuning = dataclasses.replace(tuning(c, model), attention=str(model.backend))
        optimizer, self._opt_state = abstract_optimizer(c, self._trainable, self.mesh)
        self._options = SamplingOptions(
            temperature=c.rollout.temperature,
            eos_ids=(_END,),
            banned_ids=tuple(sorted({job.model.image_token_id, job.model.video_token_id})),
            pad_id=_PAD,
            require_exact=True,
        )
        how = dict(temperature=c.rollout.temperature, banned_ids=self._options.banned_ids, chunk=c.train.loss_chunk)
        self._learner = Learner(
            graphdef, optimizer, self._trainable, self._opt_state, job.objective, mesh=self.mesh, **how
        )
        self._sampled = self._trainable, self._frozen
        if self.sampler_mesh is not self.mesh:
            model = abstract_model(c, job.model, self.sampler_mesh)
            graphdef, *trees = split_model(model, patterns)
            self._sampled = tuple(trees)
        self.ladder = ladder(job, batch_shards(self.sampler_mesh))
        self._sampler = Sampler(graphdef, self.sampler_mesh, chunk=c.rollout.chunk, ladder=self.ladder)
        self.read = local_bytes(_decoded(self._sampled, job.model.tied))
        self.vision = local_bytes(self._frozen["vision"])

    def held(self, *, sampling: bool) -> dict[str, int]:
        """Bytes on a device of what is there whatever runs, by kind."""
        kinds = {"weights": local_bytes(self._frozen), "adapter": local_bytes(self._trainable)}
        kinds["optimiser"] = local_bytes(self._opt_state)
        if self.job.objective.beta > 0:
            kinds["reference"] = local_bytes(self._trainable)
        if self.sampler_mesh is not self.mesh:
            kinds[COPY] = local_bytes(self._sampled[1])
            if sampling:
                kinds["sampler's adapter"] = local_bytes(self._sampled[0])
        return kinds

    def phases(self) -> Iterator[Phase]:
        """Compiles one program after the other; what needs the result of one that does not fit is left out."""
        phase, program = self._encode()
        yield phase
        if program is None:
            return
        outs = jax.eval_shape(lambda x: x, program.out_info)
        features = jax.tree.map(placed, outs, program.output_shardings)
        yield from self._sampling(features)
        for mean in dict.fromkeys((self.job.cap, self.job.lengths.completion)):
            yield from self._learning(features, mean)
        yield self._finish(features)

    def _compile(
        self,
        name: str,
        kind: str,
        lower: Callable[[], Any],
        more: dict[str, int],
        *,
        rows: int,
        size: int,
        prompts: int = 0,
        mean: int = 0,
    ) -> tuple[Phase, jax.stages.Compiled | None]:
        """
        Args:
          more: bytes by kind of what is there besides `held`.
          rows: on a device; size: positions whose logits or scores must not all exist.
        """
        vocabulary = self.job.model.text.vocab_size
        kinds = self.held(sampling=kind in SAMPLING) | more
        found, program = compile_program(
            lower, kinds, lambda dtype, dims: whole_row(size, vocabulary, dtype, dims), rows
        )
        return Phase(name, kind, found, kinds, prompts, mean), program

    def _encode(self) -> tuple[Phase, jax.stages.Compiled | None]:
        job, p = self.job, self.job.prompt
        sizes = dataclasses.replace(job.row_sizes(job.cap), frames=p.frames, frame_patches=p.frame_patches)
        vision = abstract_batch(job.model, sizes, job.prompts).inputs.vision
        vision = jax.tree.map(placed, vision, row_shardings(vision, self.mesh))
        return self._compile(
            "vision encode",
            "encode",
            lambda: self._learner.lower("encode", self._trainable, self._frozen, vision, job.prompts),
            {"batch": local_bytes(vision)},
            prompts=job.prompts,
            rows=-(-job.prompts // batch_shards(self.mesh)),
            size=p.length,
        )

    def _everywhere(self, shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    def _numbers(self, filled: int) -> KeyNumbers:
        shape = (filled, self.job.branches)
        kinds = (((), jnp.uint32), (shape, jnp.uint32), (shape, jnp.int32))
        return KeyNumbers(*(self._everywhere(*kind, self.sampler_mesh) for kind in kinds))

    def _sampling(self, features: PromptFeatures) -> Iterator[Phase]:
        """Prefill; a chunk with the first cache; the last growth of the cache; a chunk with the largest."""
        job, c = self.job, self.job.config.rollout
        shards = batch_shards(self.sampler_mesh)
        filled = rows_of_sampler(job, shards)
        flat = jax.jit(lambda f: PromptFeatures(f.merged[: job.at_once], f.deepstack[:, : job.at_once]).flat())
        flat = jax.eval_shape(flat, features)
        flat = jax.tree.map(placed, flat, row_shardings(flat, self.sampler_mesh))
        there = {"features": local_bytes(features) + local_bytes(flat) * (self.sampler_mesh is not self.mesh)}
        inputs = self._prompts(filled)
        how = dict(rows=filled // shards, size=job.prompt.length, prompts=filled)
        phase, start = self._compile(
            "prefill",
            "prefill",
            lambda: self._sampler.lower(
                "start",
                self._sampled,
                inputs,
                flat,
                self._numbers(filled),
                branches=job.branches,
                options=self._options,
            ),
            there | {"batch": local_bytes(inputs)},
            **how,
        )
        yield phase
        if start is None:
            return
        cache = jax.tree.map(placed, jax.eval_shape(lambda x: x, start.out_info[0]), start.output_shardings[0])
        there["prompt cache"] = local_bytes(cache)
        rungs = [slots for slots, _ in decode_rungs(self.ladder, c.chunk, job.cap, job.cap)]
        caches = {slots: self._branch_cache(filled, slots) for slots in {*rungs[:1], *rungs[-2:]}}
        for slots in dict.fromkeys((rungs[0], rungs[-1]) if rungs else ()):
            if slots == rungs[-1] and len(rungs) > 1:
                yield self._growth(caches[rungs[-2]], rungs[-1], there, how)
            own = caches[slots]
            feed = self._feed(filled)
            yield self._compile(
                f"decode, {slots} positions",
                "decode",
                lambda own=own, feed=feed: self._sampler.lower(
                    "decode", self._sampled, cache, own=own, feed=feed, options=self._options, chunk=c.chunk
                ),
                there | {"branch cache": local_bytes(own)},
                **how,
            )[0]

    def _growth(self, smaller: Any, slots: int, there: dict[str, int], how: dict[str, int]) -> Phase:
        filled = smaller.k.shape[1]
        rows = self._everywhere((filled,), jnp.int32, self.sampler_mesh)
        columns = self._everywhere((filled, self.job.branches), jnp.int32, self.sampler_mesh)
        return self._compile(
            f"growth to {slots} positions",
            "growth",
            lambda: self._sampler.lower("take_branches", smaller, rows, columns, slots=slots),
            there | {"branch cache": local_bytes(smaller)},
            **how,
        )[0]

    def _branch_cache(self, filled: int, slots: int) -> Any:
        shape = (filled, self.job.branches, slots)
        program = self._sampler.lower("empty", self._sampled, shape=shape).compile()
        return jax.tree.map(placed, jax.eval_shape(lambda x: x, program.out_info), program.output_shardings)

    def _prompts(self, filled: int) -> ModelInputs:
        """Plain rows without frames, as `sampler_inputs.place_inputs` puts them."""
        shape = (filled, self.job.prompt.length)

        def ints(shape: tuple[int, ...], dim: int = 0) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(self.sampler_mesh, len(shape), dim))

        return ModelInputs(ints(shape), ints((3, *shape), 1), ints(shape), ints(shape), None)

    def _feed(self, filled: int) -> ChunkInputs:
        shape = (filled, self.job.branches)

        def numbers(dtype: Any, shape: tuple[int, ...] = shape) -> jax.ShapeDtypeStruct:
            return self._everywhere(shape, dtype, self.sampler_mesh)

        return ChunkInputs(
            last=numbers(jnp.int32),
            done=numbers(jnp.bool),
            next_position=numbers(jnp.int32),
            keys=self._numbers(filled),
            limits=numbers(jnp.int32),
            asked=None,
            step=numbers(jnp.int32, ()),
        )

    def _learning(self, features: PromptFeatures, mean: int) -> Iterator[Phase]:
        """Log-probs without and with a gradient, of one micro-batch with completions of `mean` tokens."""
        job = self.job
        rows = self._rows(mean)
        length = rows.places.shape[-1]
        batch = self._batch(length)
        whole = batch.mask
        begun = self._learner.lower("begin", batch, whole if job.separate else None).out_info
        batch, totals, *_ = jax.tree.map(lambda x: placed(x, replicated(self.mesh)), begun)
        own = {"features": local_bytes(features), "batch": job.parts * local_bytes(rows) + local_bytes(batch)}
        count, size = -(-rows.places.shape[0] // batch_shards(self.mesh)), rows.inputs.layout.size
        how = dict(rows=count, size=size, prompts=job.prompts, mean=mean)
        if job.scored:
            yield self._compile(
                f"score, completions of {mean}",
                "score",
                lambda: self._learner.lower("score", whole, self._trainable, self._frozen, features, rows),
                own,
                **how,
            )[0]
        grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), self._trainable)
        yield self._compile(
            f"gradient, completions of {mean}",
            "gradient",
            lambda: self._learner.lower("add", grads, self._trainable, self._frozen, features, rows, batch, totals),
            own | {"gradient": local_bytes(grads)},
            **how,
        )[0]

    def _finish(self, features: PromptFeatures) -> Phase:
        grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), self._trainable)
        number = self._everywhere((), jnp.float32, self.mesh)
        return self._compile(
            "optimiser",
            "optimiser",
            lambda: self._learner.lower("finish", self._trainable, self._opt_state, grads, number, number),
            {"features": local_bytes(features), "gradient": local_bytes(grads)},
            rows=0,
            size=self.job.row_sizes(self.job.cap).layout.size,
        )[0]

    def _batch(self, length: int) -> RolloutBatch:
        """All completions of a step, as they come from the host."""
        count, beta = self.job.prompts * self.job.branches, self.job.objective.beta
        kinds = dict(tokens=np.int32, mask=np.float32, old_logprobs=np.float32)
        found = {name: self._everywhere((count, length), kind, self.mesh) for name, kind in kinds.items()}
        kinds = dict(groups=np.int32, rewards=np.float32, truncated=bool)
        found |= {name: self._everywhere((count,), kind, self.mesh) for name, kind in kinds.items()}
        return RolloutBatch(**found, reference_logprobs=found["mask"] if beta > 0 else None)

    def _rows(self, mean: int) -> CompletionRows:
        """A micro-batch."""
        job, sizes = self.job, self.job.row_sizes(mean)
        count = job.rows // job.parts
        inputs = abstract_batch(job.model, sizes, count).inputs._replace(vision=None)

        def ints(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *shape), jnp.int32)

        same = job.per_row == job.branches and job.parts == 1
        rows = CompletionRows(
            inputs=inputs,
            prompts=None if same else ints(),
            completions=ints(job.per_row),
            loss_index=ints(sizes.supervised),
            loss_target=ints(sizes.supervised),
            places=ints(job.per_row, sizes.length),
        )
        return jax.tree.map(placed, rows, row_shardings(rows, self.mesh))


def _decoded(trees: tuple[Any, Any], tied: bool | None) -> Any:
    """What of the trees a decode step reads: not the vision tower, and not the embedding unless it is tied."""
    kept = []
    for tree in trees:
        parts = {name: part for name, part in tree.items() if name != "vision"}
        if "embed" in parts.get("text", {}) and not tied:
            parts["text"] = {name: part for name, part in parts["text"].items() if name != "embed"}
        kept.append(parts)
    return kept
