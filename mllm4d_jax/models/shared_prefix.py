"""Attention over shared-prefix rows (see `rows/rows.py`) without an S x S array.

A prefix query sees the prefix; a branch query sees the prefix and its own branch slot, under one maximum and one
denominator. Here is the form for any device, which the kernels (`splash.py`, `flash.py`) are compared with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mllm4d_jax.models.attention import LOWEST, Backend, attention, masked_attention
from mllm4d_jax.models.layers import ATTENTION
from mllm4d_jax.parallel.products import einsum_f32
from mllm4d_jax.rows.batch import RowLayout

jax.tree_util.register_static(RowLayout)  # a layout is part of a batch's shape: one compiled step for each


def row_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array, layout: RowLayout | None, backend: Backend
) -> jax.Array:
    """Causal softmax attention of rows; scale head_dim^-0.5, softmax in fp32. Named `ATTENTION` for remat policies.

    Args:
      q: [B, S, N, d]; k, v: [B, S, K, d] with S = layout.size and N a multiple of K.
      segment_ids: i32[B, S], clip of each token, 0 for padding.
      layout: where prefix and branch slots lie; None for rows that are one causal sequence, padded on either side.
      backend: splash is one kernel call, cudnn three (`flash.SharedPrefix`).

    Returns:
      [B, S, N, d] in the dtype of q.

    Raises:
      ValueError: the rows are not as long as the layout says.
    """
    if layout is not None and q.shape[1] != layout.size:
        raise ValueError(f"rows of {q.shape[1]} tokens for {layout}, which has {layout.size}")
    if backend.name == "cudnn":
        return _flash_rows(q, k, v, segment_ids, layout, backend)
    return checkpoint_name(_rows(q, k, v, segment_ids, layout, backend), ATTENTION)


def _flash_rows(q, k, v, segment_ids, layout: RowLayout | None, backend: Backend) -> jax.Array:
    """The same by kernels that name what they keep themselves."""
    from mllm4d_jax.models.flash import SharedPrefix, flash_attention

    if layout is not None:
        return flash_attention(q, k, v, segment_ids, SharedPrefix(layout), backend.mesh)
    # Which side is padded is known on the device only. With the padding behind, causality hides it without a mask.
    size, start = q.shape[1], jnp.argmax(segment_ids != 0, axis=1)
    rolled, back = ((jnp.arange(size) + by[:, None]) % size for by in (start, -start))
    q, k, v = (jnp.take_along_axis(x, rolled[..., None, None], 1) for x in (q, k, v))
    ids = jnp.take_along_axis(segment_ids, rolled, 1)
    out = attention(q, k, v, segments=ids, causal=True, backend=backend, lone=True)
    return jnp.take_along_axis(out, back[..., None, None], 1)


def _rows(q, k, v, segment_ids, layout: RowLayout | None, backend: Backend) -> jax.Array:
    if layout is None:
        return attention(q, k, v, segments=segment_ids, causal=True, backend=backend)
    if backend.name == "splash":
        from mllm4d_jax.models.splash import splash_attention

        where = dict(mesh=backend.mesh, interpret=backend.interpret)
        return splash_attention(q, k, v, segment_ids, causal=True, layout=layout, **where)
    p = layout.prefix
    first = _prefix_queries(q[:, :p], k[:, :p], v[:, :p], segment_ids[:, :p], backend.query_block)
    return jnp.concatenate([first, _branch_queries(q, k, v, segment_ids, layout, backend.query_block)], axis=1)


def _prefix_queries(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, block: int | None) -> jax.Array:
    """Causal attention of the prefix region, `block` queries at a time."""
    p, keys, values = q.shape[1], k.swapaxes(1, 2), v.swapaxes(1, 2)

    def attend(q, ids, index):
        mask = (ids[:, :, None] == segments[:, None, :]) & (jnp.arange(p) <= index[:, None])
        return masked_attention(q, keys, values, mask)

    return _in_blocks(attend, q, segments, block, axis=1)


def _in_blocks(attend, q: jax.Array, ids: jax.Array, block: int | None, axis: int) -> jax.Array:
    """Apply `attend(q, ids, index)` to all queries of q (along dimension `axis`), or to a block of them at a time."""
    length = q.shape[axis]
    if block is None or length <= block:
        return attend(q, ids, jnp.arange(length))
    count = -(-length // block)

    def pieces(x: jax.Array) -> jax.Array:
        # Added queries see nothing or padding; what they compute is cut off.
        x = jnp.pad(x, [(0, count * block - length if d == axis else 0) for d in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), axis, 0)

    index = jnp.arange(count * block).reshape(count, block)
    # Scores of a block are computed again in the backward pass, else the blocks would add up to P x P.
    out = jax.lax.map(jax.checkpoint(lambda x: attend(*x)), (pieces(q), pieces(ids), index))
    out = jnp.moveaxis(out, 0, axis)
    whole = out.reshape(*out.shape[:axis], count * block, *out.shape[axis + 2 :])
    return jax.lax.slice_in_dim(whole, 0, length, axis=axis)


def _branch_queries(q, k, v, segment_ids, layout: RowLayout, block: int | None) -> jax.Array:
    """Attention of all branch slots: whole, or a few slots or a part of one slot at a time."""
    b, _, n, d = q.shape
    p, slots, length = layout.prefix, layout.slots, layout.length
    prefix = (k[:, :p], v[:, :p], segment_ids[:, :p])
    branches = [x[:, p:].reshape(b, slots, length, *x.shape[2:]) for x in (q, k, v, segment_ids)]
    if block is None or slots * length <= block:
        return slot_attention(*branches, *prefix).reshape(b, slots * length, n, d)
    # As many slots at a time as fit into a block and divide the slots; at least one.
    some = max(c for c in range(1, slots + 1) if slots % c == 0 and (c == 1 or c * length <= block))

    pieces = tuple(x.reshape(b, slots // some, some, *x.shape[2:]).swapaxes(0, 1) for x in branches)
    out = jax.lax.map(jax.checkpoint(lambda x: slot_attention(*x, *prefix, block=block)), pieces)
    return out.swapaxes(0, 1).reshape(b, slots * length, n, d)


def slot_attention(q, k, v, ids, prefix_k, prefix_v, prefix_ids, block: int | None = None) -> jax.Array:
    """Attention of the tokens of C branch slots to the prefix and, causally, to their own slot.

    Args:
      q: [B, C, L, N, d]; k, v: [B, C, L, K, d]; ids: i32[B, C, L] segments.
      prefix_k, prefix_v: [B, P, K, d]; prefix_ids: i32[B, P].
      block: queries of a slot at a time; None for all.

    Returns:
      [B, C, L, N, d].
    """
    length = q.shape[2]

    def attend(q, q_ids, index):
        see_prefix = q_ids[..., None] == prefix_ids[:, None, None, :]  # bool[B,C,M,P]
        see_own = (q_ids[..., None] == ids[:, :, None, :]) & (jnp.arange(length) <= index[:, None])  # bool[B,C,M,L]
        return _two_parts(q, prefix_k, prefix_v, see_prefix, k, v, see_own)

    return _in_blocks(attend, q, ids, block, axis=2)


def _two_parts(q, prefix_k, prefix_v, see_prefix, own_k, own_v, see_own) -> jax.Array:
    """One softmax over two sets of keys.

    Args:
      q: [B, C, M, N, d] queries of C slots.
      prefix_k, prefix_v: [B, P, K, d], common to all slots; see_prefix: bool[B, C, M, P].
      own_k, own_v: [B, C, L, K, d], of each slot; see_own: bool[B, C, M, L].

    Returns:
      [B, C, M, N, d].
    """
    b, c, m, n, d = q.shape
    grouped = q.reshape(b, c, m, prefix_k.shape[2], -1, d)
    scores = [einsum_f32("bcmkgd,bpkd->bkgcmp", grouped, prefix_k), einsum_f32("bcmkgd,bclkd->bkgcml", grouped, own_k)]
    masks = (see_prefix[:, None, None], see_own[:, None, None])
    scores = [jnp.where(mask, s * d**-0.5, LOWEST) for s, mask in zip(scores, masks, strict=True)]
    # The result does not depend on the maximum, so it needs no gradient.
    top = jax.lax.stop_gradient(jnp.maximum(*(s.max(-1, keepdims=True) for s in scores)))
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(-1) for w in weights)  # f32[B,K,G,C,M]
    out = einsum_f32("bkgcmp,bpkd->bkgcmd", weights[0].astype(q.dtype), prefix_v)
    out += einsum_f32("bkgcml,bclkd->bkgcmd", weights[1].astype(q.dtype), own_v)
    out = (out / total[..., None]).astype(q.dtype)
    return out.transpose(0, 3, 4, 1, 2, 5).reshape(b, c, m, n, d)
