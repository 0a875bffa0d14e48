"""Attention by flash kernels on NVIDIA GPUs (`cudnn.py`): exact FLOPs, and no masks where lengths say the same.

A branch query of a shared-prefix row sees keys in two places. Each place is a kernel call of its own, so that the
prefix's keys are read where they are, once for all branches, and no pair is computed that nobody sees:

1. queries of the prefix over the prefix, causal;
2. queries of all branches, one long sequence, over the prefix;
3. queries of the branches over their own slots, causal.

2 and 3 are merged by their log-sum-exp. Backward, each of them gets the merged result and the merged log-sum-exp, with
which a flash kernel computes the gradients under the whole softmax: P = exp(scores - lse), and
dscores = P * (dout v^T - rowsum(dout * out)) knows of other keys through `lse` and `out` alone. That is why the merge
is differentiated here: JAX's own gradient of a part would leave out what its log-sum-exp does to the other part.

Queries of padding see what is convenient. Their results are finite, no real query sees their keys, and no loss depends
on them, so that their gradient is zero and adds zero to what they saw.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from mllm4d_jax.models import cudnn
from mllm4d_jax.models.layers import ATTENTION
from mllm4d_jax.parallel.rules import split_attention
from mllm4d_jax.rows.batch import RowLayout


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Every sequence by itself.

    Attributes:
      causal: position s sees positions t <= s.
      lone: each sequence is one segment from its first position on, with padding behind. Others need a mask.
    """

    causal: bool
    lone: bool

    def visible(self, segments: jax.Array) -> dict[str, Any]:
        """Return what the queries see, as the kernels take it."""
        if not self.lone:
            return dict(causal=self.causal, mask=segments[:, :, None] == segments[:, None, :])
        return dict(causal=self.causal, lengths=None if self.causal else _count(segments))

    def forward(self, q, k, v, segments) -> tuple[jax.Array, jax.Array]:
        return cudnn.forward(q, k, v, **self.visible(segments))

    def backward(self, q, k, v, segments, out, lse, dout) -> tuple[jax.Array, ...]:
        return cudnn.backward(q, k, v, out, lse, dout, **self.visible(segments))


@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Rows of a layout. Those about several clips need masks, the largest of all branch queries over the prefix."""

    layout: RowLayout

    def visible(self, segments: jax.Array) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return what the queries of each of the three calls see."""
        prefix, branches = segments[:, : self.layout.prefix], segments[:, self.layout.prefix :]
        if not self.layout.packed:
            return dict(causal=True), dict(causal=False, lengths=_count(prefix)), dict(causal=True)
        first, own = (Sequences(causal=True, lone=False).visible(x) for x in (prefix, self.slots(branches)))
        return first, dict(causal=False, mask=branches[:, :, None] == prefix[:, None, :]), own

    def slots(self, x: jax.Array) -> jax.Array:
        """[B, slots * L, ...] -> [B * slots, L, ...]"""
        return x.reshape(x.shape[0] * self.layout.slots, self.layout.length, *x.shape[2:])

    def forward(self, q, k, v, segments) -> tuple[jax.Array, jax.Array]:
        first_sees, prefix_sees, own_sees = self.visible(segments)
        (q0, q1), (k0, k1), (v0, v1) = map(self._cut, (q, k, v))
        first, first_lse = cudnn.forward(q0, k0, v0, **first_sees)
        prefix, prefix_lse = cudnn.forward(q1, k0, v0, **prefix_sees)
        own, own_lse = cudnn.forward(*map(self.slots, (q1, k1, v1)), **own_sees)
        own_lse = own_lse.reshape(len(q), self.layout.slots, *own_lse.shape[1:]).swapaxes(1, 2)
        own, own_lse = own.reshape(prefix.shape), own_lse.reshape(prefix_lse.shape)
        lse = jnp.logaddexp(prefix_lse, own_lse)

        def share(part: jax.Array, part_lse: jax.Array) -> jax.Array:
            return part * jnp.exp(part_lse - lse).swapaxes(1, 2)[..., None]

        merged = (share(prefix, prefix_lse) + share(own, own_lse)).astype(q.dtype)
        return jnp.concatenate([first, merged], 1), jnp.concatenate([first_lse, lse], 2)

    def backward(self, q, k, v, segments, out, lse, dout) -> tuple[jax.Array, ...]:
        first_sees, prefix_sees, own_sees = self.visible(segments)
        (q0, q1), (k0, k1), (v0, v1), (out0, out1), (dout0, dout1) = map(self._cut, (q, k, v, out, dout))
        lse0, lse1 = lse[..., : self.layout.prefix], lse[..., self.layout.prefix :]
        own_lse = lse1.reshape(*lse1.shape[:2], self.layout.slots, -1).swapaxes(1, 2)
        own_lse = own_lse.reshape(-1, *own_lse.shape[2:])
        dq0, dk0, dv0 = cudnn.backward(q0, k0, v0, out0, lse0, dout0, **first_sees)
        dq1, dk1, dv1 = cudnn.backward(q1, k0, v0, out1, lse1, dout1, **prefix_sees)
        q2, k2, v2, out2, dout2 = map(self.slots, (q1, k1, v1, out1, dout1))
        own = cudnn.backward(q2, k2, v2, out2, own_lse, dout2, **own_sees)
        dq2, dk2, dv2 = (g.reshape(g.shape[0] // self.layout.slots, -1, *g.shape[2:]) for g in own)
        return tuple(jnp.concatenate(g, 1) for g in ((dq0, dq1 + dq2), (dk0 + dk1, dk2), (dv0 + dv1, dv2)))

    def _cut(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x[:, : self.layout.prefix], x[:, self.layout.prefix :]


def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, form: Sequences | SharedPrefix, mesh: Mesh | None
) -> jax.Array:
    """Compute attention within segments; scale head_dim^-0.5, softmax in fp32.

    Under a mesh of several devices every device runs the kernels on its rows (axes data, fsdp) and heads (axis tensor);
    rows or heads that do not divide are repeated on them. What the backward pass needs besides q, k and v is named
    `ATTENTION`, so that a remat policy can keep it in place of running the forward kernels again.

    Args:
      q: [B, S, N, d]; k, v: [B, S, K, d] with N a multiple of K; bfloat16 or float16.
      segments: i32[B, S], 0 for padding.
      form: how sequences or rows are laid out.
      mesh: as in `attention.Backend`.

    Returns:
      [B, S, N, d] in the dtype of q.
    """
    run = functools.partial(_attend, form)
    if mesh is not None and mesh.size > 1:
        rows, heads = split_attention(mesh, q.shape[0], q.shape[2], k.shape[2])
        wide, ids = PartitionSpec(rows, None, heads), PartitionSpec(rows)
        # The kernels' results carry no record of the axes they vary over, so that check has to be off.
        run = jax.shard_map(run, mesh=mesh, in_specs=(wide, wide, wide, ids), out_specs=wide, check_vma=False)
    return run(q, k, v, jnp.asarray(segments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: Sequences | SharedPrefix, q, k, v, segments) -> jax.Array:
    return form.forward(q, k, v, segments)[0]


def _attend_forward(form, q, k, v, segments):
    out, lse = (checkpoint_name(x, ATTENTION) for x in form.forward(q, k, v, segments))
    return out, (q, k, v, segments, out, lse)


def _attend_backward(form, kept, dout):
    return *form.backward(*kept, dout), None


_attend.defvjp(_attend_forward, _attend_backward)


def _count(segments: jax.Array) -> jax.Array:
    """i32[B] real tokens of each row, at least one: a softmax over nothing is not a number."""
    return jnp.maximum(jnp.count_nonzero(segments, axis=1), 1).astype(jnp.int32)
