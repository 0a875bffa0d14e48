"""Decoding many completions of each prompt: one token per branch and step, over a prompt cache that all branches share.

The blocks are the decoder's own; only attention differs from the training pass, because a query is one token and its
keys lie in two places. The prompt's keys are read where prefill put them, once for all branches of the prompt; a
branch's own keys are in a cache that a loop carries and one step writes one slot of. Each branch has a slot of its own
to write: branches that begin when others end are as far as they are.

Branches may begin with tokens of their own (questions about one video): prefill then fills the first slots of their
caches. Questions differ in length, so a shorter one leaves slots empty before the first new token, which are never
seen.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm4d_jax.encode.positions import next_position
from mllm4d_jax.generate.joined import JoinedAttention, Layers
from mllm4d_jax.models import rope
from mllm4d_jax.models.attention import LOWEST, Backend
from mllm4d_jax.models.layers import scan_layers
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.shared_prefix import slot_attention
from mllm4d_jax.models.text import DecoderBlock, KVCache, run_lengths
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel.products import einsum_f32
from mllm4d_jax.parallel.rules import BATCH_AXES, RULES, batch_shards, constrain, constrain_rows
from mllm4d_jax.rows.batch import ModelInputs


class PromptCache(NamedTuple):
    """Keys and values of prompts, never written again."""

    kv: KVCache  # [layers, B, K, P, head_dim]
    visible: jax.Array  # bool[B, P], True where a slot holds a real token


class PrefilledPrompts(NamedTuple):
    """Result of `prefill`."""

    cache: PromptCache
    hidden: jax.Array  # [B, H] of the last real token, after the final norm: predicts the first token of every branch
    next_position: jax.Array  # i32[B] M-RoPE position of that first token, the same on all three axes


class Asked(NamedTuple):
    """Tokens of their own that branches had before their first new one."""

    lengths: jax.Array  # i32[B, G], in the first slots of each branch's cache
    slots: jax.Array  # i32[B, G] slots left for them; new tokens come after


class PromptRows(NamedTuple):
    """Result of `prefill_rows` and `prefill_branches`; N branch slots of L tokens."""

    cache: PromptCache  # of the prefixes
    own: KVCache  # [layers, B, K, N, L, head_dim] of what each branch was given
    hidden: jax.Array  # [B, N, H] of the last token of each branch, after the final norm
    next_position: jax.Array  # i32[B, N] M-RoPE position of the token that follows


def prefill(model: QwenVL, inputs: ModelInputs, features: VisionFeatures | None = None) -> PrefilledPrompts:
    """Runs the prompts once.

    Args:
      inputs: plain rows, padded on either side.
      features: vision features computed before; None encodes `inputs.vision` here.

    Raises:
      ValueError: rows of the shared-prefix layout, which `prefill_rows` is for.
    """
    if inputs.layout is not None:
        raise ValueError(f"every row must be one prompt, these are shared-prefix rows ({inputs.layout})")
    out = model.forward(inputs, features=features, keep_cache=True)
    b, p = inputs.tokens.shape
    visible = inputs.segment_ids != 0
    last = jnp.max(jnp.where(visible, jnp.arange(p), -1), -1)
    ends = jnp.arange(b), last
    cache = PromptCache(constrain_cache(out.cache, model.mesh), visible)
    following = next_position(jnp.asarray(inputs.positions)[:, *ends])
    return PrefilledPrompts(cache, out.hidden[ends], following.astype(jnp.int32))


def prefill_rows(model: QwenVL, inputs: ModelInputs, features: VisionFeatures | None = None) -> PromptRows:
    """Runs prefixes and the beginnings of their branches once, with the attention of training.

    Args:
      inputs: shared-prefix rows about one clip each (see `rows/rows.py`), one branch in a slot.
      features: vision features computed before; None encodes `inputs.vision` here.

    Raises:
      ValueError: plain rows.
    """
    layout = inputs.layout
    if layout is None:
        raise ValueError("shared-prefix rows are needed, these are plain ones")
    out = model.forward(inputs, features=features, keep_cache=True)
    p, real = layout.prefix, inputs.segment_ids != 0
    prefix, own = (KVCache(*(x[..., part, :] for x in out.cache)) for part in (slice(None, p), slice(p, None)))
    cache = PromptCache(constrain_cache(prefix, model.mesh), real[:, :p])
    return _branch_rows(model, inputs, cache, own, out.hidden[:, p:])


def prefill_branches(model: QwenVL, inputs: ModelInputs, prompts: PromptCache) -> PromptRows:
    """Runs the beginnings of branches over prefixes that were run before (`prefill`), with the attention of training.

    Args:
      inputs: shared-prefix rows without their prefixes (a layout with a prefix of 0 slots), text alone.
      prompts: of the same rows.

    Raises:
      ValueError: plain rows, or rows with prefixes of their own.
    """
    layout = inputs.layout
    if layout is None or layout.prefix:
        raise ValueError(f"the branches of shared-prefix rows are needed, without prefixes; these are {layout}")
    config, shape = model.config.text, (len(inputs.tokens), layout.slots, layout.length)
    ids, prefix_ids = inputs.segment_ids.reshape(shape), prompts.visible.astype(jnp.int32)
    x, _ = model.embed(inputs, None)
    cos, sin = rope.text_rope(config.rope, config.head_dim, inputs.positions, x.dtype)

    def step(block: DecoderBlock, hidden: jax.Array, layer: jax.Array):
        keys, values = (x[layer].swapaxes(1, 2) for x in prompts.kv)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            slots = (x.reshape(*shape, *x.shape[2:]) for x in (q, k, v))
            out = slot_attention(*slots, ids, keys, values, prefix_ids, model.backend.query_block)
            return out.reshape(q.shape)

        hidden, k, v = block.attend(hidden, cos, sin, attend, None)
        hidden = block.feed_forward(hidden, inputs.segment_ids != 0, model.backend)[0]
        return constrain_rows(hidden, model.mesh), KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2))

    caches = []
    for (start, count, _), blocks in zip(run_lengths(config), model.text.stacks, strict=True):
        x, kept = scan_layers(blocks, step, x, start + jnp.arange(count))
        caches.append(kept)
    own = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
    return _branch_rows(model, inputs, prompts, own, model.text.norm(x))


def _branch_rows(model: QwenVL, inputs: ModelInputs, cache: PromptCache, own: KVCache, hidden: jax.Array) -> PromptRows:
    """The result of a pass over branches: `own` keys and values [layers, B, K, N*L, d], hidden states [B, N*L, H]."""
    layout = inputs.layout
    p, branches = layout.prefix, (layout.slots, layout.length)
    in_slots = (inputs.segment_ids[:, p:] != 0).reshape(-1, *branches)  # bool[B, N, L]
    lengths = in_slots.sum(-1, dtype=jnp.int32)  # 0 for a slot without a branch
    last = jnp.maximum(lengths - 1, 0)
    hidden = hidden.reshape(*in_slots.shape, -1)
    hidden = jnp.take_along_axis(hidden, last[..., None, None], 2)[:, :, 0]
    places = inputs.positions[:, :, p:].reshape(3, *in_slots.shape)
    following = next_position(jnp.take_along_axis(places, last[None, ..., None], 3)[..., 0])
    # [layers, B, K, N * L, d] -> [layers, B, K, N, L, d]
    own = KVCache(*(x.reshape(*x.shape[:3], *branches, x.shape[-1]) for x in own))
    return PromptRows(cache, constrain_cache(own, model.mesh), hidden, following.astype(jnp.int32))


def empty_branches(model: QwenVL, prompts: int, branches: int, slots: int, apart: bool = False) -> KVCache:
    """A cache [layers, B, K, G, T, head_dim] of zeros for B prompts with G branches of up to T tokens.

    `apart`: one array a layer, see `cache_apart`.
    """
    c = model.config.text
    shape, dtype = (prompts, c.num_kv_heads, branches, slots, c.head_dim), model.text.embed.dtype
    if apart:
        cache = KVCache(*(tuple(jnp.zeros(shape, dtype) for _ in range(c.num_layers)) for _ in range(2)))
    else:
        cache = KVCache(*(jnp.zeros((c.num_layers, *shape), dtype) for _ in range(2)))
    return constrain_cache(cache, model.mesh)


def cache_apart(cache: KVCache) -> KVCache:
    """A cache as one array a layer: k and v are tuples of [B, ...], what else is said of the dimensions holds."""
    return KVCache(*(tuple(x[n] for n in range(len(x))) for x in cache))


def constrain_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Splits rows over the batch axes and key heads, the next dimension, as the projections' outputs are."""
    if mesh is None:
        return cache
    rows = 0 if isinstance(cache.k, tuple) else 1

    def split(x: jax.Array) -> jax.Array:
        axes: list = [None] * x.ndim
        if x.shape[rows] % batch_shards(mesh) == 0:
            axes[rows] = BATCH_AXES
        if x.shape[rows + 1] % mesh.shape[RULES["kv"]] == 0:
            axes[rows + 1] = RULES["kv"]
        return constrain(x, mesh, *axes)

    return jax.tree.map(split, cache)


def decode(
    model: QwenVL,
    tokens: jax.Array,
    positions: jax.Array,
    prompts: PromptCache,
    own: KVCache,
    slots: jax.Array,
    asked: Asked | None = None,
    layers: Layers | None = None,
) -> tuple[jax.Array, KVCache]:
    """Feeds one token to each branch.

    Args:
      tokens: i32[B, G].
      positions: i32[B, G], one M-RoPE position for all three axes, as for text.
      prompts: of the B prompts.
      own: [layers, B, K, G, T, head_dim]; slots below those to write hold what was fed before.
      slots: i32[B, G] slot of each branch to write, below T.
      asked: what the branches began with; None for branches without tokens of their own.
      layers: the blocks, each with weights of its own; the caches are then one array a layer, too. None scans the
        model's.

    Returns:
      (hidden [B, G, H] after the final norm, the branch cache with the slots written).
    """
    config = model.config.text
    x = constrain_rows(model.text.embed[...][tokens], model.mesh)
    on_axes = jnp.broadcast_to(positions, (3, *positions.shape))
    tables = rope.text_rope(config.rope, config.head_dim, on_axes, x.dtype)
    token = _Token(tables, prompts.visible, slots, asked, model.backend)
    if layers is not None:
        kept = []
        for block, *caches in zip(layers, *prompts.kv, *own, strict=True):
            x, mine = token.through(block, x, KVCache(*caches[:2]), KVCache(*caches[2:]))
            kept.append(mine)
        return model.text.norm(x), KVCache(*zip(*kept, strict=True))

    def step(block, carry, layer):
        hidden, own = carry
        # The prompt's keys are indexed, not scanned over, so that stacks of several kinds need no parts of them.
        prompt = KVCache(*(x[layer] for x in prompts.kv))
        return token.through(block, hidden, prompt, own, layer), None

    carry = (x, own)
    for (start, count, _), blocks in zip(run_lengths(config), model.text.stacks, strict=True):
        carry, _ = scan_layers(blocks, step, carry, start + jnp.arange(count))
    return model.text.norm(carry[0]), carry[1]


class _Token(NamedTuple):
    """What a step's token of every branch has in all layers, see `decode`."""

    tables: tuple[jax.Array, jax.Array]
    visible: jax.Array
    slots: jax.Array
    asked: Asked | None
    backend: Backend

    def through(
        self, block: DecoderBlock, hidden: jax.Array, prompt: KVCache, own: KVCache, layer: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """(hidden states after the block, `own` with the slots written); `own` is of all layers if one is named."""
        x, shape = block.input_norm(hidden), hidden.shape[:2]
        if isinstance(block.attn, JoinedAttention) and block.attn.kernels:
            asked = self.asked or Asked(*[jnp.zeros(shape, jnp.int32)] * 2)
            hidden, own = block.attn.step(hidden, x, self.tables, prompt, own, self.visible, self.slots, asked)
        else:
            q, k, v = block.attn.project(x, *self.tables)
            own = KVCache(self._written(own.k, k, layer), self._written(own.v, v, layer))
            mine = own if layer is None else KVCache(*(cache[layer] for cache in own))
            out = branch_attention(q, prompt, self.visible, mine, self.slots, self.asked)
            hidden = hidden + block.attn.o_proj(out.reshape(*shape, -1))
        hidden = block.feed_forward(hidden, jnp.ones(shape, bool), self.backend)[0]
        return constrain_rows(hidden, self.backend.mesh), own

    def _written(self, cache: jax.Array, new: jax.Array, layer: jax.Array | None) -> jax.Array:
        """`cache` ([layers,] B, K, G, T, head_dim) with `new` [B, G, K, head_dim] in the slots, in place."""
        first, slots = cache.ndim - 5, self.slots[..., None]
        if layer is not None:
            slots = jnp.concatenate([jnp.full_like(slots, layer), slots], -1)
        # Rows and branches by their own numbers, so that each device writes its own.
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3),
            inserted_window_dims=(*range(first), first + 3),
            scatter_dims_to_operand_dims=(*range(first), first + 3),
            operand_batching_dims=(first, first + 2),
            scatter_indices_batching_dims=(0, 1),
        )
        there = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
        return jax.lax.scatter(cache, slots, new, numbers, unique_indices=True, mode=there)


def branch_attention(
    q: jax.Array, prompt: KVCache, visible: jax.Array, own: KVCache, slots: jax.Array, asked: Asked | None = None
) -> jax.Array:
    """Attention of one token per branch to its prompt and its own branch: one maximum, one denominator, in fp32.

    Args:
      q: [B, G, N, d].
      prompt: k, v [B, K, P, d] with N a multiple of K; visible: bool[B, P].
      own: k, v [B, K, G, T, d], seen up to and including `slots` i32[B, G], but for slots that `asked` leaves empty.

    Returns:
      [B, G, N, d] in the dtype of q.
    """
    b, g, n, d = q.shape
    p, t = prompt.k.shape[-2], own.k.shape[-2]
    grouped = q.reshape(b, g, prompt.k.shape[1], -1, d).swapaxes(1, 2)
    first = einsum_f32("bkgnd,bkpd->bkgnp", grouped, prompt.k)
    second = einsum_f32("bkgnd,bkgtd->bkgnt", grouped, own.k)
    places = jnp.arange(t)
    seen = places <= slots[..., None]
    if asked is not None:
        seen &= (places < asked.lengths[..., None]) | (places >= asked.slots[..., None])
    seen = jnp.concatenate([jnp.broadcast_to(visible[:, None], (b, g, p)), seen], -1)[:, None, :, None]
    scores = jnp.where(seen, jnp.concatenate([first, second], -1) * d**-0.5, LOWEST)
    weights = jax.nn.softmax(scores, -1).astype(q.dtype)
    out = einsum_f32("bkgnp,bkpd->bkgnd", weights[..., :p], prompt.v)
    out += einsum_f32("bkgnt,bkgtd->bkgnd", weights[..., p:], own.v)
    return out.astype(q.dtype).swapaxes(1, 2).reshape(b, g, n, d)
