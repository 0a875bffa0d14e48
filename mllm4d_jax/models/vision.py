"""Vision towers of Qwen3-VL (position table, DeepStack taps) and Qwen2.5-VL (windows). Shape-static and jittable.

The tower sees frames: [F, L] patches with host-made index arrays (`encode/grids.py`). A frame attends only to
itself, by construction of the batch dimension and by its segment ids.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.encode.grids import VisionInputs
from mllm4d_jax.models import rope
from mllm4d_jax.models.attention import Backend, attention
from mllm4d_jax.models.config import VisionConfig
from mllm4d_jax.models.layers import MLP, GatedMLP, LayerNorm, Linear, RMSNorm, parameter, scan_layers, stack
from mllm4d_jax.parallel.rules import constrain, constrain_rows

NORM_EPS = 1e-6  # fixed in every release, not a configuration key


class VisionFeatures(NamedTuple):
    """Output of the tower; R = F * L / merge_size^2 rows, raster order within a frame, padding rows meaningless."""

    merged: jax.Array  # [R, H] features that replace placeholder embeddings
    # [K, R, H] added after the first K decoder layers, earliest tapped block first; K = 0 for Qwen2.5-VL.
    deepstack: jax.Array


class PlainMLP(nnx.Module):
    """fc2(gelu(fc1(x))) with the tanh approximation (vision blocks) or the exact erf (mergers)."""

    def __init__(self, d_in: int, hidden: int, d_out: int, *, approximate: bool, dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(d_in, hidden, axes=("embed", "mlp"), bias=True, dtype=dtype, rngs=rngs, name=MLP)
        self.fc2 = Linear(hidden, d_out, axes=("mlp", "embed"), bias=True, dtype=dtype, rngs=rngs)
        self.approximate = approximate

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.approximate))


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP; rotary in fp32."""

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        d, kw = config.hidden_size, dict(dtype=dtype, rngs=rngs)
        qwen3 = config.position_side > 0
        norm = LayerNorm if qwen3 else RMSNorm
        self.norm1, self.norm2 = norm(d, NORM_EPS, **kw), norm(d, NORM_EPS, **kw)
        self.qkv = Linear(d, 3 * d, axes=("embed", "heads"), bias=True, **kw)
        self.proj = Linear(d, d, axes=("heads", "embed"), bias=True, **kw)
        if qwen3:
            self.mlp = PlainMLP(d, config.intermediate_size, d, approximate=True, **kw)
        else:
            self.mlp = GatedMLP(d, config.intermediate_size, bias=True, **kw)
        self.num_heads = config.num_heads
        self.lone = not config.window  # a frame is one segment, its patches before its padding

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, segments: jax.Array, backend: Backend
    ) -> jax.Array:
        f, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(f, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q, k = (rope.rotate(t.astype(jnp.float32), cos, sin).astype(x.dtype) for t in (q, k))
        out = attention(q, k, v, segments=segments, causal=False, backend=backend, lone=self.lone)
        x = x + self.proj(out.reshape(f, n, d))
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """merge_size^2 patches -> one decoder token. Norm before grouping (main) or after (DeepStack)."""

    def __init__(self, config: VisionConfig, *, norm_after: bool, dtype, rngs: nnx.Rngs):
        self.group = config.merge_size**2
        width = config.hidden_size * self.group
        norm = LayerNorm if config.position_side else RMSNorm
        self.norm = norm(width if norm_after else config.hidden_size, NORM_EPS, dtype=dtype, rngs=rngs)
        self.norm_after = norm_after
        self.mlp = PlainMLP(width, width, config.out_hidden_size, approximate=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[F, L, D] -> [F * L / group, H]."""
        if not self.norm_after:
            x = self.norm(x)
        x = x.reshape(-1, x.shape[-1] * self.group)
        if self.norm_after:
            x = self.norm(x)
        return self.mlp(x)


class VisionTower(nnx.Module):
    """Patches to decoder features.

    Args of the call:
      inputs: see `VisionInputs`.
      backend: attention backend, already resolved.
      collect: also return the intermediate tensors (parity checks); they cost memory of depth * F * L * D.

    Returns:
      VisionFeatures, or (VisionFeatures, dict) with collect: patch_embed, rope_cos, rope_sin, block_in [F,L,.] and
      blocks [depth,F,L,D].
    """

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, rngs=rngs)
        self.patch_embed = Linear(
            config.patch_dim, config.hidden_size, axes=(None, "embed"), bias=config.position_side > 0, **kw
        )
        table = (config.position_side**2, config.hidden_size)
        self.pos_embed = parameter(rngs, table, dtype, (None, "embed")) if config.position_side else None
        self.blocks = stack(lambda r: VisionBlock(config, dtype=dtype, rngs=r), config.depth, rngs)
        self.merger = Merger(config, norm_after=False, **kw)
        self.deepstack_mergers = nnx.List([Merger(config, norm_after=True, **kw) for _ in config.deepstack])
        self.config = config

    def __call__(self, inputs: VisionInputs, backend: Backend, *, remat: str = "none", collect: bool = False):
        config = self.config
        dtype = self.patch_embed.kernel.dtype
        mesh = backend.mesh  # frames lie row by row, so they are split like rows
        x = embedded = constrain_rows(self.patch_embed(inputs.patches.astype(dtype)), mesh)
        if self.pos_embed is not None:
            x = x + self._positions(inputs, mesh).astype(dtype)
        block_in = x
        cos, sin = rope.vision_rope(config.head_dim, inputs.rowcol)

        # Slot of the tap buffer each block writes; K (out of range, dropped) for blocks that are not tapped.
        taps = len(config.deepstack)
        slots = [config.deepstack.index(i) if i in config.deepstack else taps for i in range(config.depth)]

        def step(block, carry, x):
            hidden, tapped = carry
            slot, whole_frame = x
            hidden = block(hidden, cos, sin, self._segments(inputs, whole_frame), backend)
            hidden = constrain_rows(hidden, mesh)
            if taps:
                tapped = tapped.at[slot].set(hidden, mode="drop")
            return (hidden, tapped), hidden if collect else None

        carry = (x, constrain_rows(jnp.zeros((taps, *x.shape), x.dtype), mesh, 1))
        layers = (jnp.array(slots), self._whole_frame())
        (x, tapped), outputs = scan_layers(self.blocks, step, carry, layers, remat=remat)
        merged = constrain_rows(self.merger(x), mesh)
        # Merger j belongs to the j-th listed block, but features are handed on in the order the blocks run.
        order = sorted(range(taps), key=config.deepstack.__getitem__)
        deepstack = [constrain_rows(self.deepstack_mergers[j](tapped[j]), mesh) for j in order]
        features = VisionFeatures(merged, jnp.stack(deepstack) if deepstack else jnp.zeros((0, *merged.shape), dtype))
        if not collect:
            return features
        return features, dict(patch_embed=embedded, block_in=block_in, rope_cos=cos, rope_sin=sin, blocks=outputs)

    def blocks_from(self, hidden: jax.Array, inputs: VisionInputs, backend: Backend) -> jax.Array:
        """Every block on an input of its own, [depth, F, L, D] -> [depth, F, L, D] (parity checks).

        Rounding errors then do not compound, so a deviating block is told apart from its successors.
        """
        cos, sin = rope.vision_rope(self.config.head_dim, inputs.rowcol)

        def step(block, carry, x):
            hidden, whole_frame = x
            return carry, block(hidden, cos, sin, self._segments(inputs, whole_frame), backend)

        return scan_layers(self.blocks, step, None, (hidden, self._whole_frame()))[1]

    def _whole_frame(self) -> jax.Array:
        """bool[depth]: blocks that attend within the frame rather than within a window."""
        config = self.config
        return jnp.array([not config.window or i in config.full_blocks for i in range(config.depth)])

    def _segments(self, inputs: VisionInputs, whole_frame: jax.Array) -> jax.Array:
        if not self.config.window:
            return inputs.frame_segments
        return jnp.where(whole_frame, inputs.frame_segments, inputs.window_segments)

    def _positions(self, inputs: VisionInputs, mesh: Mesh | None) -> jax.Array:
        """Bilinear samples of the position table, fp32 [F, L, D]; one tap at a time to keep the gather small."""
        table = constrain(self.pos_embed[...], mesh).astype(jnp.float32)  # whole everywhere: it is small
        return sum(table[inputs.table_index[..., i]] * inputs.table_weight[..., i, None] for i in range(4))
