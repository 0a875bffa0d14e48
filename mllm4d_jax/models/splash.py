"""The TPU kernel: splash attention with segment ids, for plain and for shared-prefix rows, on one device or a mesh.

Imported only where it is used, because Pallas takes long to import.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from mllm4d_jax.parallel.rules import split_attention
from mllm4d_jax.rows.batch import RowLayout

_LANES = 128  # sequence blocks of the kernel are multiples of the vector lanes


class SharedPrefixMask(masks._ComputableMask):
    """Key k is visible to query q if it does not come later and lies in the prefix or in q's own branch slot.

    Computed inside the kernel from the indices, so that no mask array exists; blocks without a visible pair are
    skipped. Which clip a token belongs to is left to the segment ids. Equality and hash let the kernel cache what it
    derives from a mask.
    """

    def __init__(self, size: int, layout: RowLayout) -> None:
        self.layout = layout
        p, length = layout.prefix, layout.length

        def visible(q, k):  # on NumPy arrays when blocks are listed, on JAX arrays inside the kernel
            return (k <= q) & ((k < p) | ((q - p) // length == (k - p) // length))

        super().__init__((size, size), visible)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SharedPrefixMask):
            return NotImplemented
        return (self.shape, self.layout) == (other.shape, other.layout)

    def __hash__(self) -> int:
        return hash((type(self), self.shape, self.layout))


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    causal: bool,
    mesh: Mesh | None,
    interpret: bool,
    layout: RowLayout | None = None,
) -> jax.Array:
    """Attention within segments, as `attention.attention` describes; with a layout, as `shared_prefix` does.

    Sequences of any length are padded to whole blocks here. Under a mesh of several devices every device runs the
    kernel on its rows (axes data, fsdp) and heads (axis tensor); rows or heads that do not divide are repeated on them.

    Args:
      q: [B, S, N, d]; k, v: [B, S, K, d]; segments: i32[B, S].
      causal: implied by a layout.
      mesh, interpret: as in `attention.Backend`.

    Returns:
      [B, S, N, d] in the dtype of q.
    """
    s, d = q.shape[1], q.shape[3]
    # Padding gets segment -1: it is seen by nothing real and its own rows are cut off below.
    q, k, v, segments = _pad(q, 0), _pad(k, 0), _pad(v, 0), _pad(segments, -1)
    rows, heads = split_attention(mesh, q.shape[0], q.shape[2], k.shape[2])
    if layout is not None:
        mask = SharedPrefixMask(q.shape[1], layout)
    else:
        mask = (masks.CausalMask if causal else masks.FullMask)((q.shape[1], q.shape[1]))
    local_heads = q.shape[2] // (mesh.shape[heads] if mesh is not None and heads else 1)
    attend = _make_kernel(mask, local_heads, interpret)

    def run(q, k, v, segments):
        return jax.vmap(attend)(q, k, v, segment_ids=kernel.SegmentIds(q=segments, kv=segments))

    if mesh is not None and mesh.size > 1:
        wide, ids = PartitionSpec(rows, heads), PartitionSpec(rows)
        # The kernel's results carry no record of the axes they vary over, so that check has to be off.
        run = jax.shard_map(run, mesh=mesh, in_specs=(wide, wide, wide, ids), out_specs=wide, check_vma=False)
    out = run(*(x.swapaxes(1, 2) for x in (q * d**-0.5, k, v)), segments)
    return out.swapaxes(1, 2)[:, :s].astype(q.dtype)


def _make_kernel(mask: masks.Mask, heads: int, interpret: bool):
    block = next(b for b in (512, 256, _LANES) if mask.shape[0] % b == 0)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    blocks = kernel.BlockSizes(**{f"block_{name}": block for name in names})
    # The block lists must be plain arrays: traced ones could not leave the scan over layers.
    with jax.ensure_compile_time_eval():
        return kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret,
        )  # fmt: skip


def _pad(x: jax.Array, value: int) -> jax.Array:
    """Dimension 1 up to a multiple of the lanes."""
    pad = -x.shape[1] % _LANES
    return jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=value) if pad else x
