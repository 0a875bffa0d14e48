"""Sampling G completions of each of B prompts: prefill once, then jitted chunks of decode steps with early exit.

The model is the learner's own (no second implementation), and log-probs come from the functions that the learner uses
(`rl/policy.py`). Between chunks the host reads the new tokens, ends completions and packs what goes on into smaller
arrays. On the device are only the caches; everything else about a branch follows from numbers that the host sends
along, so that where and beside what a branch is computed cannot change what it says (up to the rounding of matrix
products, whose order of summation may depend on their shapes).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.models.decoding import Prompt, PromptCache, constrain_cache, decode, empty_branches, prefill
from mllm4d_jax.models.text import KVCache
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel.rules import batch_sharding, batch_shards, constrain, replicated
from mllm4d_jax.processing.batch import ModelInputs
from mllm4d_jax.rl.completions import CompletionRecord, Completions, Detokenize, SamplingStatistics
from mllm4d_jax.rl.packing import Ladder, Packing
from mllm4d_jax.rl.policy import head_logits
from mllm4d_jax.rl.sampling import SamplingOptions, branch_keys, draw
from mllm4d_jax.train.state import merge_model


class Feed(NamedTuple):
    """What the host sends with every chunk.

    Attributes:
      last: i32[B, G], the token before; done: bool[B, G].
      next_position: i32[B], M-RoPE position of each prompt's first new token.
      seed: u32[]; prompt_ids: u32[B]; branches: i32[B, G]: what random keys are made of.
      limits: i32[B, G], longest completion.
      step: i32[], number of the first token to draw.
    """

    last: Any
    done: Any
    next_position: Any
    seed: Any
    prompt_ids: Any
    branches: Any
    limits: Any
    step: Any


class Chunk(NamedTuple):
    """Result of a chunk of n steps.

    Attributes:
      own: the branch cache.
      tokens: i32[B, G, n]; logprobs: f32[B, G, n]; only the first `steps` were computed.
    """

    own: KVCache
    tokens: jax.Array
    logprobs: jax.Array
    steps: jax.Array


class Sampler:
    """Generates for any number of batches; keeps the compiled programs.

    Attributes:
      compiles: programs compiled so far (prefill, packing and decode chunks), counted when traced.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, mesh: Mesh | None = None, *, chunk: int = 32, ladder: Ladder | None = None
    ) -> None:
        """
        Args:
          graphdef: structure of the model, from `nnx.split`.
          mesh: the mesh that the model was made for, None for one device.
          chunk: decode steps between two looks of the host.
          ladder: sizes of the device's arrays; None for powers of two that fit the mesh.

        Raises:
          ValueError: a mesh that splits weights over `fsdp`: every decode step would gather all of them.
        """
        if mesh is not None and mesh.shape.get("fsdp", 1) > 1:
            raise ValueError(
                f"sampling on a mesh with fsdp = {mesh.shape['fsdp']} gathers all weights for every token: "
                "place the model on a mesh of data and tensor"
            )
        if chunk < 1:
            raise ValueError(f"a chunk needs at least one step, got {chunk}")
        self.mesh, self.chunk, self.compiles = mesh, chunk, 0
        self.ladder = ladder or Ladder(shards=1 if mesh is None else batch_shards(mesh))
        self._start = self._compiled(functools.partial(_start, graphdef), ("branches", "options"))
        self._empty = self._compiled(functools.partial(_empty, graphdef), ("shape",))
        self._decode = self._compiled(functools.partial(_decode_chunk, graphdef), ("options", "chunk"), ("own",))
        self._take_prompts = self._compiled(functools.partial(_take_prompts, mesh))
        self._take_branches = self._compiled(functools.partial(_take_branches, mesh), ("slots",))

    def _compiled(self, function, static: tuple = (), donated: tuple = ()):
        def counted(*args, **kwargs):
            self.compiles += 1  # runs when traced, not when executed
            return function(*args, **kwargs)

        return jax.jit(counted, static_argnames=static, donate_argnames=donated)

    def generate(
        self,
        weights: tuple,
        inputs: ModelInputs,
        *,
        prompt_ids: Sequence[int],
        branches: int,
        max_new_tokens: int | np.ndarray,
        options: SamplingOptions,
        seed: int = 0,
        features: VisionFeatures | None = None,
        detokenize: Detokenize | None = None,
    ) -> Completions:
        """Draws the completions. Each depends on (seed, prompt id, branch number), its prompt and the weights alone.

        Args:
          weights: the trees that `train.state.merge_model` takes.
          inputs: plain rows, one prompt each, padded on either side; on the host, or already on the devices.
          prompt_ids: a number in [0, 2^32) for each prompt, see `sampling.prompt_id`.
          branches: completions per prompt (G).
          max_new_tokens: length cap; one number, or an array that broadcasts to [B, G].
          seed: in [0, 2^32); another one gives other completions.
          features: vision features computed before; None encodes `inputs.vision`.
          detokenize: needed for `options.stop`.

        Raises:
          ValueError: arguments that contradict each other, or rows of the shared-prefix layout.
        """
        started = time.monotonic()
        prompts = len(inputs.tokens)
        limits = _limits(max_new_tokens, prompts, branches)
        ids = _prompt_ids(prompt_ids, prompts)
        record = CompletionRecord(limits, options, detokenize)
        on_device = dataclasses.replace(options, stop=())  # texts are the host's matter: no program for each
        most = max(int(limits.max()) - 1, 1)  # the last token of a completion is never fed back
        filled = -(-prompts // self.ladder.shards) * self.ladder.shards
        packing = Packing.whole(prompts, filled, branches, self.ladder.slots(min(self.chunk, most), most))
        numbers = (np.uint32(seed), ids[packing.rows], packing.branches)
        placed = place_inputs(fill_rows(inputs, packing.rows), self.mesh)
        cache, following, first, scores = self._start(
            weights, placed, features, *self._everywhere(numbers), branches=branches, options=on_device
        )
        following = np.asarray(following)[:prompts]
        record.add(packing.row_grid, packing.branches, packing.used, np.asarray(first), np.asarray(scores), 0)
        prefill_seconds = time.monotonic() - started
        state = _Run(record, packing, limits, ids, following, np.uint32(seed), on_device)
        return record.result(self._continue(weights, state, cache, prefill_seconds))

    def _continue(self, weights: tuple, run: _Run, cache: PromptCache, prefill_seconds: float) -> SamplingStatistics:
        """Decodes until every branch has ended."""
        record, packing, step, computed, compactions, own = run.record, run.packing, 1, 0, 0, None
        most, chunks = max(int(run.limits.max()) - 1, 1), []
        while not record.finished.all():
            started = time.monotonic()
            needed = min(step + self.chunk - 1, most)
            wanted = self.ladder.pack(packing, ~record.finished, needed, most)
            if own is None:
                own = self._empty(weights, shape=packing.shape)
            if wanted is not packing:
                cache, own = self._repack(cache, own, packing, wanted)
                packing, compactions = wanted, compactions + 1
            out = self._decode(
                weights, cache, own, self._everywhere(run.feed(packing, step)), options=run.options, chunk=self.chunk
            )
            own, n = out.own, int(out.steps)
            tokens, logprobs = np.asarray(out.tokens)[..., :n], np.asarray(out.logprobs)[..., :n]
            record.add(packing.row_grid, packing.branches, packing.used, tokens, logprobs, step)
            step, computed = step + n, computed + n * packing.used.size
            chunks.append((n, time.monotonic() - started))
        return SamplingStatistics(step - 1, computed, 0, compactions, prefill_seconds, tuple(chunks))

    def _repack(self, cache: PromptCache, own: KVCache, packing: Packing, wanted: Packing):
        rows, columns = packing.places(wanted)
        if wanted.rows is not packing.rows:
            cache = self._take_prompts(cache, self._everywhere(rows))
        return cache, self._take_branches(own, *self._everywhere((rows, columns)), slots=wanted.slots)

    def _everywhere(self, tree):
        """Host numbers on all devices."""
        return tree if self.mesh is None else jax.device_put(tree, replicated(self.mesh))


class _Run(NamedTuple):
    """One call of `generate`: numbers of all prompts and branches, from which a chunk's feed is taken."""

    record: CompletionRecord
    packing: Packing
    limits: np.ndarray
    prompt_ids: np.ndarray
    next_position: np.ndarray
    seed: np.uint32
    options: SamplingOptions

    def feed(self, packing: Packing, step: int) -> Feed:
        rows, branches = packing.row_grid, packing.branches
        return Feed(
            last=self.record.last_tokens(rows, branches, step),
            done=self.record.finished[rows, branches] | ~packing.used,
            next_position=self.next_position[packing.rows],
            seed=self.seed,
            prompt_ids=self.prompt_ids[packing.rows],
            branches=branches,
            limits=self.limits[rows, branches],
            step=np.int32(step),
        )


def _limits(max_new_tokens: int | np.ndarray, prompts: int, branches: int) -> np.ndarray:
    if branches < 1 or prompts < 1:
        raise ValueError(f"at least one prompt and one branch are required, got {prompts} and {branches}")
    limits = np.array(np.broadcast_to(max_new_tokens, (prompts, branches)), np.int32)
    if limits.min() < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {limits.min()}")
    return limits


def _prompt_ids(ids: Sequence[int], prompts: int) -> np.ndarray:
    if len(ids) != prompts:
        raise ValueError(f"{len(ids)} prompt ids for {prompts} prompts")
    if any(not 0 <= int(i) < 2**32 for i in ids):
        raise ValueError(f"prompt ids must be in [0, 2^32), got {list(ids)}")
    return np.array([int(i) for i in ids], np.uint32)


def fill_rows(inputs: ModelInputs, rows: np.ndarray) -> ModelInputs:
    """Rows `rows` of a batch (each prompt, then repetitions), with the vision inputs as they are."""
    if np.array_equal(rows, np.arange(len(inputs.tokens))):
        return inputs
    return inputs._replace(
        tokens=inputs.tokens[rows],
        positions=inputs.positions[:, rows],
        segment_ids=inputs.segment_ids[rows],
        vision_index=inputs.vision_index[rows],
    )


def place_inputs(inputs: ModelInputs, mesh: Mesh | None) -> ModelInputs:
    """Rows and frames split over the batch axes of the mesh where they can be."""
    if mesh is None:
        return inputs

    def put(x, dim: int = 0):
        split = x.shape[dim] % batch_shards(mesh) == 0
        return jax.device_put(x, batch_sharding(mesh, x.ndim, dim) if split else replicated(mesh))

    return inputs._replace(
        tokens=put(inputs.tokens),
        positions=put(inputs.positions, 1),
        segment_ids=put(inputs.segment_ids),
        vision_index=put(inputs.vision_index),
        vision=jax.tree.map(put, inputs.vision),
    )


def _start(graphdef, weights, inputs, features, seed, prompt_ids, numbers, *, branches: int, options: SamplingOptions):
    """Prefill and the first token of every branch: (cache, next positions, tokens [B, G, 1], log-probs [B, G, 1])."""
    model = merge_model(graphdef, *weights)
    prompt: Prompt = prefill(model, inputs, features)
    logits = head_logits(prompt.hidden, model.head_kernel())
    logits = jnp.broadcast_to(logits[:, None], (len(logits), branches, logits.shape[-1]))
    tokens, logprobs = draw(logits, branch_keys(seed, prompt_ids, numbers), 0, options)
    small = (prompt.next_position, tokens[..., None], logprobs[..., None])
    return prompt.cache, *(constrain(x, model.mesh) for x in small)


def _empty(graphdef, weights, *, shape: tuple[int, int, int]) -> KVCache:
    return empty_branches(merge_model(graphdef, *weights), *shape)


def _decode_chunk(
    graphdef, weights, cache: PromptCache, own: KVCache, feed: Feed, *, options: SamplingOptions, chunk: int
) -> Chunk:
    """Up to `chunk` steps; ends when every branch has ended by an end token or its limit."""
    model = merge_model(graphdef, *weights)
    head, eos = model.head_kernel(), jnp.array(options.eos_ids, jnp.int32)
    keys = branch_keys(feed.seed, feed.prompt_ids, feed.branches)

    def going(carry):
        i, done, *_ = carry
        return (i < chunk) & ~jnp.all(done)

    def body(carry):
        i, done, last, own, tokens, logprobs = carry
        index = feed.step + i  # of the token to draw; the one before it is fed to the slot with its own number
        positions = jnp.broadcast_to(feed.next_position[:, None] + index - 1, last.shape)
        hidden, own = decode(model, last, positions, cache, own, index - 1)
        new, scores = draw(head_logits(hidden, head), keys, index, options)
        new, scores = jnp.where(done, options.pad_id, new), jnp.where(done, 0.0, scores)
        tokens = jax.lax.dynamic_update_slice(tokens, new[..., None], (0, 0, i))
        logprobs = jax.lax.dynamic_update_slice(logprobs, scores[..., None], (0, 0, i))
        done = done | jnp.isin(new, eos) | (index + 1 >= feed.limits)
        return i + 1, done, new, own, tokens, logprobs

    blank = jnp.full((*feed.last.shape, chunk), options.pad_id, jnp.int32)
    carry = (jnp.int32(0), feed.done, feed.last, own, blank, jnp.zeros(blank.shape, jnp.float32))
    steps, _, _, own, tokens, logprobs = jax.lax.while_loop(going, body, carry)
    own = constrain_cache(own, model.mesh)
    return Chunk(own, constrain(tokens, model.mesh), constrain(logprobs, model.mesh), steps)


def _take_prompts(mesh: Mesh | None, cache: PromptCache, rows) -> PromptCache:
    return PromptCache(constrain_cache(KVCache(*(x[:, rows] for x in cache.kv)), mesh), cache.visible[rows])


def _take_branches(mesh: Mesh | None, own: KVCache, rows, columns, *, slots: int) -> KVCache:
    """Branches at (row, column), each with `slots` positions (at least as many as before)."""

    def take(x: jax.Array) -> jax.Array:
        more = slots - x.shape[-2]
        return jnp.pad(x[:, rows[:, None], columns], ((0, 0),) * 4 + ((0, more), (0, 0)))

    return constrain_cache(KVCache(*(take(x) for x in own)), mesh)
