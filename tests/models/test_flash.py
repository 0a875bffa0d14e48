"""Attention by flash kernels. What is around cuDNN's kernels is checked on a CPU, with kernels written in plain JAX in
their place; that cuDNN's own are called, without masks and S x S products, is read in programs lowered for CUDA.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mllm4d_jax.models import cudnn, flash
from mllm4d_jax.models.attention import Backend, attention
from mllm4d_jax.models.layers import KEPT
from mllm4d_jax.models.shared_prefix import row_attention
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.batch import RowLayout
from tests.models import test_splash_rows as rows

LONE = RowLayout(prefix=21, slots=6, length=9, packed=False)
BACKEND = Backend("cudnn")


def scores(q, k, causal, lengths, mask):
    """f32[B, K, G, S, T] under what the kernels are told, -inf where nothing is seen."""
    b, s, n, d = q.shape
    seen = jnp.ones((b, s, k.shape[1]), bool) if mask is None else mask
    if causal:
        seen &= jnp.tril(jnp.ones(seen.shape[1:], bool))
    if lengths is not None:
        seen &= jnp.arange(k.shape[1]) < lengths[:, None, None]
    grouped = q.reshape(b, s, k.shape[2], -1, d)
    # As a bias does: a query that sees nothing sees everything, far down.
    return jnp.einsum("bskgd,btkd->bkgst", grouped, k) * d**-0.5 + jnp.where(seen, 0, cudnn.HIDDEN)[:, None, None]


def plain_forward(q, k, v, *, causal, lengths=None, mask=None):
    s = scores(q, k, causal, lengths, mask)
    lse = jax.nn.logsumexp(s, -1)
    out = jnp.einsum("bkgst,btkd->bskgd", jnp.exp(s - lse[..., None]), v)
    return out.reshape(q.shape), lse.reshape(len(q), q.shape[2], q.shape[1])


def plain_backward(q, k, v, out, lse, dout, *, causal, lengths=None, mask=None):
    """The backward pass of FlashAttention: it knows the softmax by `lse` and `out` alone."""
    s = scores(q, k, causal, lengths, mask)
    p = jnp.exp(s - lse.reshape(*s.shape[:-1], 1))
    q5, out5, dout5 = (x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]) for x in (q, out, dout))
    dp = jnp.einsum("bskgd,btkd->bkgst", dout5, v)
    ds = p * (dp - jnp.einsum("bskgd,bskgd->bkgs", dout5, out5)[..., None]) * q.shape[3] ** -0.5
    dq = jnp.einsum("bkgst,btkd->bskgd", ds, k).reshape(q.shape)
    return dq, jnp.einsum("bkgst,bskgd->btkd", ds, q5), jnp.einsum("bkgst,bskgd->btkd", p, dout5)


@pytest.fixture
def kernels(monkeypatch):
    """Both kernels in plain JAX; a test may replace either once more."""
    monkeypatch.setattr(cudnn, "forward", plain_forward)
    monkeypatch.setattr(cudnn, "backward", plain_backward)
    return monkeypatch


def lone_inputs(layout=LONE, b=3, n=4, k=2, d=8, seed=0):
    """One clip a row: prefixes of several lengths, an empty slot, a full one, and a last row without anything."""
    q, key, v, _ = rows.inputs(layout, b, n, k, d, seed)
    ids, rng = np.zeros((b, layout.size), np.int32), np.random.default_rng(seed)
    for row in range(b - 1):
        ids[row, : layout.prefix - 5 * row] = 1
        for slot in range(layout.slots):
            length = {1: 0, 2: layout.length}.get(slot, rng.integers(1, layout.length))
            start = layout.prefix + slot * layout.length
            ids[row, start : start + length] = 1
    return q, key, v, ids


@functools.cache
def lone_expected(layout=LONE, **kwargs):
    data = lone_inputs(layout, **kwargs)
    return rows.reference(*data, layout), [np.asarray(g) for g in rows.dense_gradients(*data, layout)]


# Key heads and queries for each; head sizes of the published models.
HEADS = [dict(n=4, k=2, d=8), dict(n=8, k=1, d=64), dict(n=2, k=2, d=72), dict(n=6, k=2, d=80), dict(n=4, k=1, d=128)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rows_of_one_clip(kernels, heads):
    data = lone_inputs(**heads)
    rows.compare(rows.run(BACKEND, LONE, *data), lone_expected(**heads), data[3], 2e-5)


@pytest.mark.parametrize("heads", HEADS[:2], ids=str)
def test_rows_of_several_clips(kernels, heads):
    data = rows.inputs(**heads)
    rows.compare(rows.run(BACKEND, rows.SMALL, *data), rows.expected(**heads), data[3], 2e-5)


def part_lse(q, k, v, out, lse, dout, **sees):
    """A part's own log-sum-exp in place of the merged one."""
    return plain_backward(q, k, v, out, plain_forward(q, k, v, **sees)[1], dout, **sees)


def part_out(q, k, v, out, lse, dout, **sees):
    return plain_backward(q, k, v, plain_forward(q, k, v, **sees)[0], lse, dout, **sees)


def neighbours(self, x):
    """Two slots as one sequence: the second sees the first."""
    return x.reshape(x.shape[0] * self.layout.slots // 2, 2 * self.layout.length, *x.shape[2:])


def moved(by):
    def forward(q, k, v, *, causal, lengths=None, mask=None):
        if not causal:
            return plain_forward(q, k, v, causal=False, lengths=lengths, mask=mask)
        mask = jnp.ones((q.shape[0], q.shape[1], k.shape[1]), bool) if mask is None else mask
        mask &= jnp.tril(jnp.ones(mask.shape[1:], bool), by)
        return plain_forward(q, k, v, causal=False, mask=mask)

    return forward


def no_lengths(q, k, v, *, causal, lengths=None, mask=None):
    return plain_forward(q, k, v, causal=causal, mask=mask)


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (cudnn, "backward", part_lse),
        (cudnn, "backward", part_out),
        (cudnn, "forward", moved(1)),
        (cudnn, "forward", moved(-1)),
        (cudnn, "forward", no_lengths),
        (flash.SharedPrefix, "slots", neighbours),
    ],
    ids=["own lse", "own out", "sees the next", "not itself", "sees padding", "sees its neighbour"],
)
def test_faults_are_noticed(kernels, place, name, fault):
    kernels.setattr(place, name, fault)
    data = lone_inputs()
    if name == "slots":
        kernels.setattr(flash.SharedPrefix, "forward", forward_of_neighbours)
    with pytest.raises(AssertionError):
        rows.compare(rows.run(BACKEND, LONE, *data), lone_expected(), data[3], 2e-5)


def forward_of_neighbours(self, q, k, v, segments):
    return original_forward(dataclasses.replace(self), q, k, v, segments)


original_forward = flash.SharedPrefix.forward
