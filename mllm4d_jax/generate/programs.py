"""The programs of the sampler, to be compiled: prefill, the caches of a rectangle of branches, and decode steps.

On the device are only the caches; everything else about a branch follows from numbers that the host sends along, so
that where and beside what a branch is computed cannot change what it says (up to the rounding of matrix products, whose
order of summation may depend on their shapes).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm4d_jax.encode.grids import VisionInputs
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
from mllm4d_jax.generate.joined import Layers, layers_apart
from mllm4d_jax.generate.policy import SamplingOptions, branch_keys, draw, head_logits
from mllm4d_jax.models.split import merge_model
from mllm4d_jax.models.text import KVCache
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel.rules import constrain


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
    index: Any  # i32[B, G], number of each branch's first token to draw
    enough: Any  # i32[], rows that have ended at which the host is to look before the chunk is full


def prefix(graphdef, weights, inputs) -> PromptCache:
    """The common beginning of prompts that are not all known yet."""
    return prefill(merge_model(graphdef, *weights), inputs).cache


def start(
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


def layers(graphdef, weights, *, kernels: bool) -> Layers:
    """The decoder's blocks, each with weights of its own."""
    return layers_apart(merge_model(graphdef, *weights), kernels)


def encode(graphdef, weights, vision: VisionInputs) -> VisionFeatures:
    """Features of all frames."""
    return merge_model(graphdef, *weights).encode_vision(vision)


def empty(
    graphdef, weights, *, shape: tuple[int, int, int], prompt: int, apart: bool = False
) -> tuple[PromptCache, KVCache]:
    """Caches of a packing's shape without prompts, each of which can have `prompt` tokens."""
    model, (rows, width, slots) = merge_model(graphdef, *weights), shape
    prompts = empty_branches(model, rows, 1, prompt, apart)
    kv = jax.tree.map(lambda x: x.reshape(*x.shape[:-3], prompt, x.shape[-1]), prompts)
    cache = PromptCache(constrain_cache(kv, model.mesh), jnp.zeros((rows, prompt), bool))
    return cache, empty_branches(model, rows, width, slots, apart)


def insert(
    mesh: Mesh | None, rows, arrived: PromptCache, began: KVCache | None, *, cache: PromptCache, own: KVCache
) -> tuple[PromptCache, KVCache]:
    """The caches with prompts in some rows, and with what their branches began with; nothing else is copied.

    Args:
      rows: i32[b] of each prompt of `arrived` and `began`; beyond the caches for prompts that only fill up.
    """

    def put(x: jax.Array, new: jax.Array, dims: int) -> jax.Array:
        return x.at[..., rows, *map(slice, new.shape[-dims:])].set(new, mode="drop")

    kv = jax.tree.map(lambda x, new: put(x, new, 3), cache.kv, arrived.kv)
    length = cache.visible.shape[1] - arrived.visible.shape[1]
    visible = cache.visible.at[rows].set(jnp.pad(arrived.visible, ((0, 0), (0, length))), mode="drop")
    if began is not None:
        own = jax.tree.map(lambda x, new: put(x, new, 4), own, began)
    return PromptCache(constrain_cache(kv, mesh), visible), constrain_cache(own, mesh)


def decode_chunk(
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
    """Up to n = `chunk` steps; ends when all branches of `feed.enough` rows have ended by an end token or their limit.

    Returns:
      (branches' cache, tokens i32[B, G, n], log-probs f32[B, G, n], number of steps i32[] that were computed).
    """
    model = merge_model(graphdef, *weights)
    eos = jnp.array(options.eos_ids, jnp.int32)
    keys, asked = branch_keys(*feed.keys), feed.asked
    first = 0 if asked is None else asked.slots  # slots of the first new tokens

    def going(carry):
        i, done, *_ = carry
        return (i < chunk) & (jnp.sum(jnp.all(done, 1)) < feed.enough)

    def body(carry):
        i, done, index, last, own, tokens, logprobs = carry
        # `index` is of the token to draw; the one before it is fed to the slot with its own number.
        positions, slots = feed.next_position + index - 1, first + index - 1
        hidden, own = decode(model, last, positions, cache, own, slots, asked, layers)
        # The head is named within the loop: a tied one is a transposed view there, outside it would be a copy.
        new, scores = draw(head_logits(hidden, model.head_kernel()), keys, index, options)
        new, scores = jnp.where(done, options.pad_id, new), jnp.where(done, 0.0, scores)
        tokens = jax.lax.dynamic_update_slice(tokens, new[..., None], (0, 0, i))
        logprobs = jax.lax.dynamic_update_slice(logprobs, scores[..., None], (0, 0, i))
        done = done | jnp.isin(new, eos) | (index + 1 >= feed.limits)
        # A branch that has ended stays where it is, within its cache.
        return i + 1, done, jnp.where(done, index, index + 1), new, own, tokens, logprobs

    blank = jnp.full((*feed.last.shape, chunk), options.pad_id, jnp.int32)
    carry = (jnp.int32(0), feed.done, feed.index, feed.last, own, blank, jnp.zeros(blank.shape, jnp.float32))
    steps, _, _, _, own, tokens, logprobs = jax.lax.while_loop(going, body, carry)
    tokens, logprobs = (constrain(x, model.mesh) for x in (tokens, logprobs))
    return constrain_cache(own, model.mesh), tokens, logprobs, steps


def take_prompts(mesh: Mesh | None, cache: PromptCache, rows) -> PromptCache:
    """Prompts of some rows."""
    kept = jax.tree.map(lambda x: x[..., rows, :, :, :], cache.kv)
    return PromptCache(constrain_cache(kept, mesh), cache.visible[rows])


def take_branches(mesh: Mesh | None, own: KVCache, rows, columns) -> KVCache:
    """Branches at (row, column); rows None: each where it is."""

    def take(x: jax.Array) -> jax.Array:
        x = x if rows is None else x[..., rows, :, :, :, :]
        index = columns[:, None, :, None, None]
        return jnp.take_along_axis(x, index.reshape((1,) * (x.ndim - 5) + index.shape), -3)

    return constrain_cache(jax.tree.map(take, own), mesh)


def grow_prompts(mesh: Mesh | None, cache: PromptCache, *, prompt: int) -> PromptCache:
    """Prompts' cache with room for so many tokens of each, at least as many as before."""
    kv = jax.tree.map(lambda x: _padded(x, (prompt, x.shape[-1])), cache.kv)
    return PromptCache(constrain_cache(kv, mesh), _padded(cache.visible, (prompt,)))


def grow_branches(mesh: Mesh | None, own: KVCache, *, width: int, slots: int) -> KVCache:
    """Branches' cache with so many entries of a row and so many positions of each, at least as many as before."""
    return constrain_cache(jax.tree.map(lambda x: _padded(x, (width, slots, x.shape[-1])), own), mesh)


def _padded(x: jax.Array, last: tuple[int, ...]) -> jax.Array:
    """`x` with zeros behind it, its last dimensions of these sizes."""
    more = (n - size for n, size in zip(last, x.shape[-len(last) :], strict=True))
    return jnp.pad(x, ((0, 0),) * (x.ndim - len(last)) + tuple((0, n) for n in more))
