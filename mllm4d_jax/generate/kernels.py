"""Kernels of a decode step on one NVIDIA GPU, where a step is bound by the number of kernels besides its products.

Attention of XLA's own takes eleven kernels a layer, and what stands between the product for queries, keys and values
and attention (second half of the adapters, norm, rotation, the caches) eight. These are three, written with Pallas.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mllm4d_jax.models.attention import LOWEST
from mllm4d_jax.models.text import KVCache

_KEYS, _PARTS = 128, 16  # keys of the prompt that a program looks at at a time, and most parts of the prompt
_OWN, _STEPS = 64, 8  # own keys of a branch that a program looks at at a time, and how often
_ROWS = 64  # most queries that a program has


def _interpreted() -> bool:
    """Elsewhere than on a GPU the kernels are run by an interpreter, for tests."""
    return jax.default_backend() != "gpu"


def _size(n: int, least: int = 16) -> int:
    """The sizes that products have: powers of two, 16 at least."""
    return max(least, pl.next_power_of_2(n))


def attend(
    q: jax.Array,
    prompt: KVCache,
    visible: jax.Array,
    own: KVCache,
    slots: jax.Array,
    asked: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Attention of one token per branch to its prompt and its own branch.

    Every program looks at some keys for the queries that share them; a second kernel joins what they found.

    Args:
      q: [B, K, G, n, d], n queries of each key head.
      prompt: k, v [B, K, P, d]; visible: bool[B, P].
      own: k, v [B, K, G, T, d], seen up to and including `slots` i32[B, G].
      asked: both i32[B, G]: own keys from the first number on and before the second are not seen.

    Returns:
      [B, G, K * n * d] in the dtype of q.
    """
    (b, k, g, n, d), p, t = q.shape, prompt.k.shape[2], own.k.shape[3]
    rows = min(_ROWS, _size(g * n))
    steps = pl.cdiv(p, _KEYS * _PARTS)
    blocks, parts, own_parts = pl.cdiv(g * n, rows), pl.cdiv(p, _KEYS * steps), pl.cdiv(t, _OWN * _STEPS)
    total = parts + own_parts
    size = (b, k, total, g * n)
    f32 = jnp.float32
    kernel = functools.partial(_look, keys=(p, t), shape=(g, n, d), grid=(k, rows, blocks, parts, steps))
    numbers = jnp.stack([slots, *asked], -1).astype(jnp.int32)
    found = pl.pallas_call(
        kernel,
        grid=(b * k, blocks * parts + g * own_parts),
        out_shape=(jax.ShapeDtypeStruct((*size, d), f32), *[jax.ShapeDtypeStruct(size, f32)] * 2),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=_interpreted(),
        name="decode_attention",
    )(numbers, visible.astype(jnp.int32), q.reshape(b, k, g * n, d), *prompt, *own)
    return pl.pallas_call(
        functools.partial(_join, total=total, shape=(g, n, d)),
        grid=(b, k, g),
        out_shape=jax.ShapeDtypeStruct((b, g, k, n, d), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=_interpreted(),
        name="decode_attention_sum",
    )(*found).reshape(b, g, k * n * d)


def _nothing(rows: int, d: int):
    """Maximum of the scores, sum of their exponentials, and sum of the values by them, before any key."""
    return jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,)), jnp.zeros((rows, d))


def _more(found, q, k, v, seen):
    """`_nothing`, or what was found so far, with the keys that are seen."""
    (top, total, o), f32 = found, jnp.float32
    scores = jnp.dot(q, k.T, preferred_element_type=f32) * k.shape[-1] ** -0.5
    scores = jnp.where(seen[None], scores, LOWEST)
    new = jnp.maximum(top, scores.max(-1))
    weights, kept = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
    o = o * kept[:, None] + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=f32)
    return new, total * kept + weights.sum(-1), o


def _look(numbers, visible, q, pk, pv, ok, ov, out, tops, sums, *, keys, shape, grid):
    """What one program finds: the sum of values, not divided, with maximum and sum of the exponentials."""
    (p, t), (g, n, d), (heads, rows, blocks, parts, steps) = keys, shape, grid
    b, head, j = pl.program_id(0) // heads, pl.program_id(0) % heads, pl.program_id(1)
    columns = pl.ds(0, d)

    def put(part, first, count, size, top, total, o):
        at, real = pl.ds(first, size), jnp.arange(size) < count
        plgpu.store(out.at[b, head, part, at, columns], o, mask=real[:, None])
        plgpu.store(tops.at[b, head, part, at], top, mask=real)
        plgpu.store(sums.at[b, head, part, at], total, mask=real)

    @pl.when(j < blocks * parts)
    def _():
        part, first = j // blocks, (j % blocks) * rows
        real = first + jnp.arange(rows) < g * n
        queries = plgpu.load(q.at[b, head, pl.ds(first, rows), columns], mask=real[:, None], other=0.0)

        def step(i, found):
            start = (part * steps + i) * _KEYS
            there, at = start + jnp.arange(_KEYS) < p, pl.ds(start, _KEYS)
            k = plgpu.load(pk.at[b, head, at, columns], mask=there[:, None], other=0.0)
            v = plgpu.load(pv.at[b, head, at, columns], mask=there[:, None], other=0.0)
            return _more(found, queries, k, v, plgpu.load(visible.at[b, at], mask=there, other=0) != 0)

        found = _nothing(rows, d)
        found = step(0, found) if steps == 1 else jax.lax.fori_loop(0, steps, step, found)
        put(part, first, g * n - first, rows, *found)

    @pl.when(j >= blocks * parts)
    def _():
        part, branch = (j - blocks * parts) // g, (j - blocks * parts) % g
        size = _size(n)
        real = jnp.arange(size) < n
        queries = plgpu.load(q.at[b, head, pl.ds(branch * n, size), columns], mask=real[:, None], other=0.0)
        slot, length, begin = (numbers[b, branch, i] for i in range(3))
        start = part * _OWN * _STEPS

        def step(i, found):
            first = start + i * _OWN
            places, at = first + jnp.arange(_OWN), pl.ds(first, _OWN)
            there = places < t
            k = plgpu.load(ok.at[b, head, branch, at, columns], mask=there[:, None], other=0.0)
            v = plgpu.load(ov.at[b, head, branch, at, columns], mask=there[:, None], other=0.0)
            seen = (places <= slot) & ((places < length) | (places >= begin))
            return _more(found, queries, k, v, seen)

        # Slots that are not written yet are not read.
        filled = jnp.clip((slot - start) // _OWN + 1, 0, _STEPS)
        put(parts + part, branch * n, n, size, *jax.lax.fori_loop(0, filled, step, _nothing(size, d)))


def _join(out, tops, sums, joined, *, total, shape):
    """One branch and key head: all parts under one maximum and one denominator."""
    g, n, d = shape
    b, head, branch = (pl.program_id(axis) for axis in range(3))
    size = pl.next_power_of_2(n)
    real, at, columns = jnp.arange(size) < n, pl.ds(branch * n, size), pl.ds(0, d)

    def step(part, carry):
        top, denominator, o = carry
        found = plgpu.load(tops.at[b, head, part, at], mask=real, other=LOWEST)
        new = jnp.maximum(top, found)
        kept, weight = jnp.exp(top - new), jnp.exp(found - new)
        denominator = denominator * kept + weight * plgpu.load(sums.at[b, head, part, at], mask=real, other=0.0)
        more = plgpu.load(out.at[b, head, part, at, columns], mask=real[:, None], other=0.0)
        return new, denominator, o * kept[:, None] + weight[:, None] * more

    carry = _nothing(size, d)
    if total <= 2 * _PARTS:  # unrolled, so that all is read at once
        for part in np.arange(total, dtype=np.int32):
            carry = step(part, carry)
    else:
        carry = jax.lax.fori_loop(0, total, step, carry)
    _, denominator, o = carry
    result = (o / jnp.where(real, denominator, 1.0)[:, None]).astype(joined.dtype)
    plgpu.store(joined.at[b, branch, head, pl.ds(0, size), columns], result, mask=real[:, None])


def _low_rank(y, up, scale, at, rows, real, columns, width):
    """The product's `columns` with what an adapter adds to them: its first half lies behind the product's `width`."""
    f32, ranks = jnp.float32, up.shape[0]
    x = plgpu.load(y.at[*at, rows, columns], mask=real[:, None], other=0.0)
    added, size = jnp.zeros(x.shape, f32), min(128, ranks & -ranks)
    for first in range(0, ranks, size):
        low = plgpu.load(y.at[*at, rows, pl.ds(width + first, size)], mask=real[:, None], other=0.0)
        added += jnp.dot(low, up[pl.ds(first, size), columns], preferred_element_type=f32)
    return x + (added.astype(x.dtype) * scale[columns]).astype(x.dtype)


def place(
    y: jax.Array,
    up: jax.Array | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    norm: jax.Array | None,
    eps: float,
    tables: tuple[jax.Array, jax.Array],
    own: KVCache,
    slots: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """From the product for queries, keys and values to the queries and the caches, for one token per branch.

    One program does a head: second half of the adapters, bias, norm, rotation, and the slots of the cache.

    Args:
      y: [B, G, (N + 2 K) * d + r], behind the product what the adapters' first halves give.
      up: [r, (N + 2 K) * d], r a multiple of 16, and scale [(N + 2 K) * d]; None without adapters.
      bias: [(N + 2 K) * d] or None.
      norm: [N + K, d], weight of the RMS norm of each head, or None; eps: its epsilon.
      tables: cos and sin [B, G, d].
      own: k, v [B, K, G, T, d]; slots: i32[B, G] to write.

    Returns:
      (q [B, K, G, N / K, d], the caches with the slots written, in place).
    """
    (b, g, _), (_, k, _, _, d) = y.shape, own.k.shape
    ranks = 0 if up is None else up.shape[0]
    heads = (y.shape[-1] - ranks) // d
    n = (heads - 2 * k) // k
    rows = min(32, _size(g))
    given = dict(up=up, scale=scale, bias=bias, norm=norm)
    given = {name: x for name, x in given.items() if x is not None}
    caches = 4 + len(given)  # arguments before them
    kernel = functools.partial(_place, names=tuple(given), shape=(g, n, k, d), rows=rows, eps=eps)
    q, *own = pl.pallas_call(
        kernel,
        grid=(heads, b, pl.cdiv(g, rows)),
        out_shape=(jax.ShapeDtypeStruct((b, k, g, n, d), y.dtype), *map(jax.typeof, own)),
        input_output_aliases={caches: 1, caches + 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=_interpreted(),
        name="decode_place",
    )(slots.astype(jnp.int32), y, *tables, *given.values(), *own)
    return q, KVCache(*own)


def _place(slots, y, cos, sin, *refs, names, shape, rows, eps):
    (g, n, k, d), half = shape, shape[-1] // 2
    given, (q, keys, values) = dict(zip(names, refs, strict=False)), refs[-3:]
    head, b, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * rows
    at, real, f32 = pl.ds(first, rows), first + jnp.arange(rows) < g, jnp.float32
    # Each branch has a slot of its own.
    places = (first + jnp.arange(rows))[:, None], plgpu.load(slots.at[b, at], mask=real, other=0)[:, None]
    width = (n + 2) * k * d

    def part(i):
        columns = pl.ds(head * d + i * half, half)
        if "up" in given:
            x = _low_rank(y, given["up"], given["scale"], (b,), at, real, columns, width)
        else:
            x = plgpu.load(y.at[b, at, columns], mask=real[:, None], other=0.0)
        return x + given["bias"][columns] if "bias" in given else x

    def table(ref, i):
        return plgpu.load(ref.at[b, at, pl.ds(i * half, half)], mask=real[:, None], other=0.0).astype(f32)

    plain = [part(i) for i in range(2)]
    x = [p.astype(f32) for p in plain]
    if "norm" in given:
        square = (jnp.square(x[0]).sum(-1) + jnp.square(x[1]).sum(-1)) / d
        weight = jnp.minimum(head, (n + 1) * k - 1)
        scaled = [(p * jax.lax.rsqrt(square + eps)[:, None]).astype(q.dtype) for p in x]
        x = [(given["norm"][weight, pl.ds(i * half, half)] * scaled[i]).astype(f32) for i in range(2)]
    turned = x[0] * table(cos, 0) - x[1] * table(sin, 0), x[1] * table(cos, 1) + x[0] * table(sin, 1)
    for i in range(2):
        columns, rotated = pl.ds(i * half, half), turned[i].astype(q.dtype)
        cells = *places, (i * half + jnp.arange(half))[None]

        @pl.when(head < n * k)
        def _(columns=columns, rotated=rotated):
            plgpu.store(q.at[b, head // n, at, head % n, columns], rotated, mask=real[:, None])

        @pl.when((head >= n * k) & (head < (n + 1) * k))
        def _(cells=cells, rotated=rotated):
            plgpu.store(keys.at[b, head - n * k, *cells], rotated, mask=real[:, None])

        @pl.when(head >= (n + 1) * k)
        def _(cells=cells, i=i):
            plgpu.store(values.at[b, head - (n + 1) * k, *cells], plain[i], mask=real[:, None])


def add_adapted(y: jax.Array, up: jax.Array, scale: jax.Array, residual: jax.Array):
    """residual + product + what its adapter adds: y [B, G, out + r], up [r, out], scale [out], residual [B, G, out]."""
    b, g, width = residual.shape
    column = min(128, width & -width)
    y, count = y.reshape(b * g, -1), b * g
    rows = min(32, _size(count))
    return pl.pallas_call(
        functools.partial(_add, count=count, rows=rows, width=width, column=column),
        grid=(pl.cdiv(width, column), pl.cdiv(count, rows)),
        out_shape=jax.ShapeDtypeStruct((count, width), residual.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=_interpreted(),
        name="decode_add",
    )(y, up, scale, residual.reshape(count, width)).reshape(b, g, width)


def _add(y, up, scale, residual, out, *, count, rows, width, column):
    columns, first = pl.ds(pl.program_id(0) * column, column), pl.program_id(1) * rows
    at, real = pl.ds(first, rows), first + jnp.arange(rows) < count
    x = _low_rank(y, up, scale, (), at, real, columns, width)
    x = x + plgpu.load(residual.at[at, columns], mask=real[:, None], other=0.0)
    plgpu.store(out.at[at, columns], x, mask=real[:, None])
