"""Sampling G completions of each of B prompts: prefill once, then jitted chunks of decode steps with early exit.

The G completions of a row answer one prompt, or (shared-prefix rows) a question each about what the row begins with.

The model is the learner's own (no second implementation), and log-probs come from the functions that the learner uses
(`policy.py`). Between chunks the host reads the new tokens, ends completions and packs what goes on into smaller
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

from mllm4d_jax.generate.completions import CompletionRecord, Completions, Detokenize, SamplingStatistics
from mllm4d_jax.generate.decoding import (
    Asked,
    PromptCache,
    cache_apart,
    constrain_cache,
    decode,
    empty_branches,
    prefill,
    prefill_branches,
    prefill_rows,
)
from mllm4d_jax.generate.inputs import Call, fill_rows
from mllm4d_jax.generate.joined import Layers, choose_form, layers_apart
from mllm4d_jax.generate.policy import SamplingOptions, branch_keys, draw, head_logits
from mllm4d_jax.generate.slots import Ladder, Packing
from mllm4d_jax.models.split import merge_model
from mllm4d_jax.models.text import KVCache
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel.place import place_rows
from mllm4d_jax.parallel.products import compiler_options
from mllm4d_jax.parallel.rules import batch_shards, constrain, replicated
from mllm4d_jax.rows.batch import ModelInputs


class KeyNumbers(NamedTuple):
    """What `branch_keys` makes random keys of: seed u32[]; prompt_ids u32[B, G]; numbers i32[B, G] of the branches."""

    seed: Any
    prompt_ids: Any
    numbers: Any


class ChunkInputs(NamedTuple):
    """What the host sends with every chunk."""

    last: Any  # i32[B, G], the token before
    done: Any  # bool[B, G]
    next_position: Any  # i32[B, G], M-RoPE position of each branch's first new token
    keys: KeyNumbers
    limits: Any  # i32[B, G], longest completion
    asked: Asked | None  # what branches of shared-prefix rows began with; None for plain rows
    step: Any  # i32[], number of the first token to draw


class Sampler:
    """Generates for any number of batches; keeps the compiled programs.

    Attributes:
      compiles: programs compiled so far (prefill, packing and decode chunks), counted when traced.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        mesh: Mesh | None = None,
        *,
        chunk: int = 32,
        ladder: Ladder | None = None,
        form: str | None = None,
    ) -> None:
        """
        Args:
          graphdef: structure of the model, from `nnx.split`.
          mesh: the mesh that the model was made for, None for one device.
          chunk: decode steps between two looks of the host.
          ladder: sizes of the device's arrays; None for powers of two that fit the mesh.
          form: of decoding, of `joined.FORMS`; None for what is best on the devices.

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
        self._form = form
        self._prefix = self._compiled(functools.partial(_prefix, graphdef))
        self._start = self._compiled(functools.partial(_start, graphdef), ("branches", "options", "apart"))
        self._layers = self._compiled(functools.partial(_layers, graphdef), ("kernels",))
        self._empty = self._compiled(functools.partial(_empty, graphdef), ("shape", "apart"))
        self._decode = self._compiled(functools.partial(_decode_chunk, graphdef), ("options", "chunk"), ("own",))
        self._take_prompts = self._compiled(functools.partial(_take_prompts, mesh))
        self._take_branches = self._compiled(functools.partial(_take_branches, mesh), ("slots",))

    def _compiled(self, function, static: tuple = (), donated: tuple = ()):
        def counted(*args, **kwargs):
            self.compiles += 1  # runs when traced, not when executed
            return function(*args, **kwargs)

        options = compiler_options(self.mesh)
        return jax.jit(counted, static_argnames=static, donate_argnames=donated, compiler_options=options)

    def form(self, weights: tuple) -> str:
        """Form of decoding with these weights (arrays, or shapes that are placed), of `joined.FORMS`."""
        return choose_form(self.mesh, weights) if self._form is None else self._form

    def lower(self, program: str, *args: Any, **named: Any) -> jax.stages.Lowered:
        """The program of that name for placed shapes: "prefix", "start", "layers", "empty", "decode", "take_..."."""
        return getattr(self, f"_{program}").lower(*args, **named)

    def prefix(self, weights: tuple, inputs: ModelInputs) -> PromptCache:
        """Runs the common beginning of prompts that are not all known yet, for any number of calls of `generate`.

        Args:
          weights: as in `generate`.
          inputs: plain rows, one for each row of these calls.
        """
        return self._prefix(weights, place_rows(inputs, self.mesh))

    def generate(
        self,
        weights: tuple,
        inputs: ModelInputs,
        *,
        prompt_ids: Sequence[int] | Sequence[Sequence[int]],
        branches: int,
        max_new_tokens: int | np.ndarray,
        options: SamplingOptions,
        seed: int = 0,
        features: VisionFeatures | None = None,
        prefix: PromptCache | None = None,
        detokenize: Detokenize | None = None,
    ) -> Completions:
        """Draws the completions. Each depends on (seed, prompt id, branch number), its prompt and the weights alone.

        Args:
          weights: the trees that `models.split.merge_model` takes.
          inputs: on the host, or already on the devices. Plain rows, one prompt each, padded on either side; or
            shared-prefix rows, each about one clip, with a question in each branch slot (it may have fewer: the
            completion of an empty slot is one token that means nothing).
          prompt_ids: a number in [0, 2^32) for each prompt, see `policy.prompt_id`; for shared-prefix rows B x G of
            them, one for each question, which is then what it would be as a prompt in a row of its own.
          branches: completions per prompt (G); the slots of shared-prefix rows.
          max_new_tokens: length cap; one number, or an array that broadcasts to [B, G].
          seed: in [0, 2^32); another one gives other completions.
          features: vision features computed before; None encodes `inputs.vision`.
          prefix: of the rows, computed before by `prefix`; `inputs` are then the rows' branches alone
            (`decoding.prefill_branches`).
          detokenize: needed for `options.stop`.

        Raises:
          ValueError: arguments that contradict each other, or shared-prefix rows with several clips in a row.
        """
        started = time.monotonic()
        call = Call.checked(inputs, prompt_ids, branches, max_new_tokens)
        record = CompletionRecord(call.limits, options, detokenize)
        on_device = dataclasses.replace(options, stop=())  # texts are the host's matter: no program for each
        packing = self._first_packing(call)
        if prefix is not None and len(prefix.visible) != len(packing.rows):
            raise ValueError(f"{len(prefix.visible)} prefixes for {len(packing.rows)} rows")
        keys = KeyNumbers(np.uint32(seed), call.prompt_ids[packing.rows], call.numbers[packing.rows])
        filled, features = fill_rows(inputs, features, packing.rows)
        cache, own, following, first, scores = self._start(
            weights,
            place_rows(filled, self.mesh),
            # They come from the learner's mesh, whose devices may stand in another order (as they do on a TPU when the
            # sampler has a mesh of its own), and a program takes no arguments of two orders.
            place_rows(features, self.mesh),
            self._everywhere(keys),
            prefix,
            branches=branches,
            options=on_device,
            apart=self.form(weights) != "stacked",
        )
        following = np.asarray(following)[: len(call.limits)]
        record.add(packing, np.asarray(first), np.asarray(scores), 0)
        prefill_seconds = time.monotonic() - started
        state = _Run(record, packing, call, following, np.uint32(seed), on_device)
        return record.result(self._continue(weights, state, cache, own, prefill_seconds))

    def _first_packing(self, call: Call) -> Packing:
        """All branches. Those with tokens of their own have caches that are full; the others get them with room."""
        prompts, branches = call.limits.shape
        slots = call.slots or self.ladder.slots(min(self.chunk, call.most), call.most)
        return Packing.whole(prompts, -(-prompts // self.ladder.shards) * self.ladder.shards, branches, slots)

    def _continue(
        self, weights: tuple, run: _Run, cache: PromptCache, own: KVCache | None, prefill_seconds: float
    ) -> SamplingStatistics:
        """Decodes until every branch has ended."""
        record, packing, step, computed, compactions = run.record, run.packing, 1, 0, 0
        (slots, most), chunks = (run.call.slots, run.call.most), []
        form, layers = self.form(weights), None
        if form != "stacked" and not record.finished.all():
            layers = self._layers(weights, kernels=form == "kernels")
        while not record.finished.all():
            started = time.monotonic()
            needed = min(step + self.chunk - 1, most)
            wanted = self.ladder.pack(packing, ~record.finished, slots + needed, slots + most)
            if own is None:
                own = self._empty(weights, shape=packing.shape, apart=form != "stacked")
            if wanted is not packing:
                cache, own = self._repack(cache, own, packing, wanted)
                packing, compactions = wanted, compactions + 1
            feed = self._everywhere(run.feed(packing, step))
            # The cache by its name: a jitted function of any arguments donates none that comes by its place.
            sent = dict(own=own, feed=feed, layers=layers, options=run.options, chunk=self.chunk)
            own, *drawn, n = self._decode(weights, cache, **sent)
            n = int(n)
            tokens, logprobs = (np.asarray(x)[..., :n] for x in drawn)
            record.add(packing, tokens, logprobs, step)
            step, computed = step + n, computed + n * packing.used.size
            chunks.append((n, time.monotonic() - started))
        return SamplingStatistics(step - 1, computed, 0, compactions, prefill_seconds, tuple(chunks))

    def _repack(self, cache: PromptCache, own: KVCache, packing: Packing, wanted: Packing):
        rows, columns = packing.places(wanted)
        # Rows, or branches of a row, that all stay where they are need no other device.
        if wanted.rows is packing.rows:
            rows = None
        else:
            cache = self._take_prompts(cache, self._everywhere(rows))
        columns = None if wanted.branches is packing.branches else columns
        return cache, self._take_branches(own, *self._everywhere((rows, columns)), slots=wanted.slots)

    def _everywhere(self, tree):
        """Host numbers on all devices."""
        return tree if self.mesh is None else jax.device_put(tree, replicated(self.mesh))


class _Run(NamedTuple):
    """One call of `generate`: numbers of all prompts and branches, from which a chunk's feed is taken."""

    record: CompletionRecord
    packing: Packing
    call: Call
    next_position: np.ndarray
    seed: np.uint32
    options: SamplingOptions

    def feed(self, packing: Packing, step: int) -> ChunkInputs:
        call, at = self.call, (packing.row_grid, packing.branches)
        return ChunkInputs(
            last=self.record.last_tokens(*at, step),
            done=self.record.finished[at] | ~packing.used,
            next_position=self.next_position[at],
            keys=KeyNumbers(self.seed, call.prompt_ids[at], call.numbers[at]),
            limits=call.limits[at],
            asked=None if call.asked is None else Asked(call.asked[at], np.int32(call.slots)),
            step=np.int32(step),
        )


def _prefix(graphdef, weights, inputs) -> PromptCache:
    return prefill(merge_model(graphdef, *weights), inputs).cache


def _start(
    graphdef,
    weights,
    inputs,
    features,
    numbers: KeyNumbers,
    prefix: PromptCache | None = None,
    *,
    branches: int,
    options: SamplingOptions,
    apart: bool = False,
):
    """Prefill and the first token of every branch.

    Returns:
      (prompts' cache, branches' cache or None for plain rows, next positions [B, G], tokens [B, G, 1], log-probs
      [B, G, 1]).
    """
    model = merge_model(graphdef, *weights)
    head = model.head_kernel()
    if inputs.layout is None:
        prompt, own = prefill(model, inputs, features), None
        logits = head_logits(prompt.hidden, head)
        logits = jnp.broadcast_to(logits[:, None], (len(logits), branches, logits.shape[-1]))
        following = jnp.broadcast_to(prompt.next_position[:, None], logits.shape[:2])
    else:
        prompt = prefill_rows(model, inputs, features) if prefix is None else prefill_branches(model, inputs, prefix)
        own, logits, following = prompt.own, head_logits(prompt.hidden, head), prompt.next_position
    tokens, logprobs = draw(logits, branch_keys(*numbers), 0, options)
    small = (following, tokens[..., None], logprobs[..., None])
    cache = prompt.cache
    if apart:
        cache, own = cache._replace(kv=cache_apart(cache.kv)), own if own is None else cache_apart(own)
    return cache, own, *(constrain(x, model.mesh) for x in small)


def _layers(graphdef, weights, *, kernels: bool) -> Layers:
    return layers_apart(merge_model(graphdef, *weights), kernels)


def _empty(graphdef, weights, *, shape: tuple[int, int, int], apart: bool = False) -> KVCache:
    return empty_branches(merge_model(graphdef, *weights), *shape, apart=apart)


def _decode_chunk(
    graphdef,
    weights,
    cache: PromptCache,
    own: KVCache,
    feed: ChunkInputs,
    layers: Layers | None = None,
    *,
    options: SamplingOptions,
    chunk: int,
) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
    """Up to n = `chunk` steps; ends when every branch has ended by an end token or its limit.

    Returns:
      (branches' cache, tokens i32[B, G, n], log-probs f32[B, G, n], number of steps i32[] that were computed).
    """
    model = merge_model(graphdef, *weights)
    eos = jnp.array(options.eos_ids, jnp.int32)
    keys, asked = branch_keys(*feed.keys), feed.asked
    first = 0 if asked is None else asked.slots  # slot of the first new token

    def going(carry):
        i, done, *_ = carry
        return (i < chunk) & ~jnp.all(done)

    def body(carry):
        i, done, last, own, tokens, logprobs = carry
        index = feed.step + i  # of the token to draw; the one before it is fed to the slot with its own number
        position, slot = feed.next_position + index - 1, first + index - 1
        hidden, own = decode(model, last, position, cache, own, slot, asked, layers)
        # The head is named within the loop: a tied one is a transposed view there, outside it would be a copy.
        new, scores = draw(head_logits(hidden, model.head_kernel()), keys, index, options)
        new, scores = jnp.where(done, options.pad_id, new), jnp.where(done, 0.0, scores)
        tokens = jax.lax.dynamic_update_slice(tokens, new[..., None], (0, 0, i))
        logprobs = jax.lax.dynamic_update_slice(logprobs, scores[..., None], (0, 0, i))
        done = done | jnp.isin(new, eos) | (index + 1 >= feed.limits)
        return i + 1, done, new, own, tokens, logprobs

    blank = jnp.full((*feed.last.shape, chunk), options.pad_id, jnp.int32)
    carry = (jnp.int32(0), feed.done, feed.last, own, blank, jnp.zeros(blank.shape, jnp.float32))
    steps, _, _, own, tokens, logprobs = jax.lax.while_loop(going, body, carry)
    tokens, logprobs = (constrain(x, model.mesh) for x in (tokens, logprobs))
    return constrain_cache(own, model.mesh), tokens, logprobs, steps


def _take_prompts(mesh: Mesh | None, cache: PromptCache, rows) -> PromptCache:
    kept = jax.tree.map(lambda x: x[..., rows, :, :, :], cache.kv)
    return PromptCache(constrain_cache(kept, mesh), cache.visible[rows])


def _take_branches(mesh: Mesh | None, own: KVCache, rows, columns, *, slots: int) -> KVCache:
    """Branches at (row, column), each with `slots` positions (at least as many as before); None: all, as they are."""

    def take(x: jax.Array) -> jax.Array:
        more = slots - x.shape[-2]
        x = x if rows is None else x[..., rows, :, :, :, :]
        if columns is not None:
            index = columns[:, None, :, None, None]
            x = jnp.take_along_axis(x, index.reshape((1,) * (x.ndim - 5) + index.shape), -3)
        return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, more), (0, 0)))

    return constrain_cache(jax.tree.map(take, own), mesh)
