"""Text decoder: one scanned stack of blocks for training, prefill and decoding, with DeepStack inside the scan."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mllm4d_jax.models import rope
from mllm4d_jax.models.attention import Backend, attention, masked_attention
from mllm4d_jax.models.config import TextConfig
from mllm4d_jax.models.layers import GatedMLP, Linear, RMSNorm, scan_layers, stack
from mllm4d_jax.models.moe import RouterStats, SparseMLP
from mllm4d_jax.models.shared_prefix import row_attention
from mllm4d_jax.processing.batch import RowLayout


class KVCache(NamedTuple):
    """Keys and values of all layers; heads come before positions so that one step writes one contiguous slot.

    Attributes:
      k, v: [layers, B, K, T, head_dim] in the activation dtype; keys are stored rotated.
      segment_ids: i32[B, T], 1 where a slot holds a real token.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array


class DecoderOutput(NamedTuple):
    """Result of a decoder pass.

    Attributes:
      hidden: [B, S, H] after the final norm.
      cache: the updated cache, None without one.
      router: RouterStats with a leading layer dimension, None for dense models.
      collected: dict of intermediate tensors, empty unless asked for.
    """

    hidden: jax.Array
    cache: KVCache | None
    router: RouterStats | None
    collected: dict


def run_lengths(config: TextConfig) -> list[tuple[int, int, bool]]:
    """Layers grouped into (start, count, sparse) runs of one kind; each run is one scanned stack."""
    runs: list[tuple[int, int, bool]] = []
    for i in range(config.num_layers):
        if runs and runs[-1][2] == config.sparse(i):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, runs[-1][2])
        else:
            runs.append((i, 1, config.sparse(i)))
    return runs


class SelfAttention(nnx.Module):
    """Grouped-query attention with per-head q/k norms (Qwen3) or biases (Qwen2.5)."""

    def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
        h, d, kw = config.hidden_size, config.head_dim, dict(dtype=dtype, rngs=rngs)
        nq, nk = config.num_heads * d, config.num_kv_heads * d
        self.q_proj = Linear(h, nq, axes=("embed", "heads"), bias=config.qkv_bias, **kw)
        self.k_proj = Linear(h, nk, axes=("embed", "kv"), bias=config.qkv_bias, **kw)
        self.v_proj = Linear(h, nk, axes=("embed", "kv"), bias=config.qkv_bias, **kw)
        self.o_proj = Linear(nq, h, axes=("heads", "embed"), bias=config.o_bias, **kw)
        self.q_norm = RMSNorm(d, config.rms_norm_eps, **kw) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps, **kw) if config.qk_norm else None
        self.head_dim = d

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B,S,H] -> rotated q [B,S,N,d] and k [B,S,K,d], and v [B,S,K,d]."""
        q, k, v = (p(x).reshape(*x.shape[:2], -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v


class DecoderBlock(nnx.Module):
    """Pre-norm attention and feed-forward (dense or sparse)."""

    def __init__(self, config: TextConfig, sparse: bool, *, dtype, rngs: nnx.Rngs):
        h, kw = config.hidden_size, dict(dtype=dtype, rngs=rngs)
        self.input_norm = RMSNorm(h, config.rms_norm_eps, **kw)
        self.attn = SelfAttention(config, **kw)
        self.post_norm = RMSNorm(h, config.rms_norm_eps, **kw)
        if sparse:
            self.mlp = SparseMLP(h, config.moe, **kw)
        else:
            self.mlp = GatedMLP(h, config.intermediate_size, bias=False, **kw)
        self.sparse = sparse

    def feed_forward(self, x: jax.Array, real: jax.Array):
        """Second half of the block; returns (x, router statistics or None, router tensors or None)."""
        y = self.post_norm(x)
        if not self.sparse:
            return x + self.mlp(y), None, None
        y, stats, routed = self.mlp(y, real)
        return x + y, stats, routed


class Decoder(nnx.Module):
    """Embedding table, block stacks and final norm."""

    def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
        self.embed = nnx.Param(
            (jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)) * 0.02).astype(dtype),
            logical_axes=("vocab", "embed"),
        )

        def make(sparse: bool):
            return lambda r: DecoderBlock(config, sparse, dtype=dtype, rngs=r)

        self.stacks = nnx.List([stack(make(sparse), count, rngs) for _, count, sparse in run_lengths(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.config = config

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of `slots` positions."""
        c = self.config
        shape = (c.num_layers, batch, c.num_kv_heads, slots, c.head_dim)
        dtype = self.embed.dtype
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), jnp.int32))

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        backend: str | Backend,
        layout: RowLayout | None = None,
        deepstack: jax.Array | None = None,
        cache: KVCache | None = None,
        slot: jax.Array | int = 0,
        prefill: bool = True,
        remat: str = "none",
        collect: bool = False,
    ) -> DecoderOutput:
        """Runs the blocks.

        Args:
          x: [B, S, H] input embeddings.
          positions: i32[3, B, S].
          segment_ids: i32[B, S], 0 for padding; tokens of different segments do not see each other.
          backend: see `attention`.
          layout: of shared-prefix rows (without a cache); None for rows that are one causal sequence.
          deepstack: [K, B, S, H], row j added to the hidden states after layer j; zero away from visual tokens.
          cache: written at slots `slot .. slot+S-1`.
          prefill: with a cache: True means slot is 0 and tokens attend among themselves; False attends to the cache.
          collect: return layer outputs and router tensors too (parity checks).

        Raises:
          ValueError: both a layout and a cache, or rows that are not as long as the layout.
        """
        if layout is not None and cache is not None:
            raise ValueError("a cache holds one sequence per row and cannot be filled from shared-prefix rows")
        config = self.config
        cos, sin = rope.text_rope(config.rope, config.head_dim, config.max_positions, positions, x.dtype)
        if cache is not None:
            marks = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, slot))
            cache = cache._replace(segment_ids=marks)
        cached = None if cache is None or prefill else cache.segment_ids
        layer_pass = _LayerPass(cos, sin, segment_ids, backend, layout, deepstack, cached, slot, collect)
        carry = (x, None, None) if cache is None else (x, cache.k, cache.v)
        outputs = []
        for (start, count, sparse), blocks in zip(run_lengths(config), self.stacks, strict=True):
            layers = start + jnp.arange(count)
            carry, (stats, collected) = scan_layers(blocks, layer_pass.step, carry, layers, remat=remat)
            outputs.append((sparse, stats, collected))
        hidden, k_all, v_all = carry
        sparse_stats = [stats for sparse, stats, _ in outputs if sparse]
        router = jax.tree.map(lambda *a: jnp.concatenate(a), *sparse_stats) if sparse_stats else None
        tensors = _gather_collected(outputs, cos, sin) if collect else {}
        cache = None if cache is None else cache._replace(k=k_all, v=v_all)
        return DecoderOutput(self.norm(hidden), cache, router, tensors)


@dataclasses.dataclass(frozen=True)
class _LayerPass:
    """What every layer of one pass shares; `step` is the body of the scan.

    Attributes:
      cached: i32[B, T] segment ids of the cache when tokens attend to it, None when they attend among themselves.
    """

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array
    backend: str | Backend
    layout: RowLayout | None
    deepstack: jax.Array | None
    cached: jax.Array | None
    slot: jax.Array | int
    collect: bool

    def step(self, block: DecoderBlock, carry, layer: jax.Array):
        """(hidden, keys, values of all layers or None) -> the same after `layer`, and what the scan stacks."""
        hidden, k_all, v_all = self._attend(block, *carry, layer)
        raw, stats, routed = block.feed_forward(hidden, self.segment_ids != 0)
        hidden = raw
        if self.deepstack is not None and len(self.deepstack):
            taps = len(self.deepstack)
            hidden = raw + jnp.where(layer < taps, self.deepstack[jnp.minimum(layer, taps - 1)], 0)
        return (hidden, k_all, v_all), (stats, (raw, hidden, routed) if self.collect else None)

    def _attend(self, block: DecoderBlock, hidden: jax.Array, k_all, v_all, layer: jax.Array):
        q, k, v = block.attn.project(block.input_norm(hidden), self.cos, self.sin)
        if k_all is not None:
            at = (layer, 0, 0, self.slot, 0)
            k_all = jax.lax.dynamic_update_slice(k_all, k.swapaxes(1, 2)[None], at)
            v_all = jax.lax.dynamic_update_slice(v_all, v.swapaxes(1, 2)[None], at)
        ids = self.segment_ids
        if self.layout is not None:
            out = row_attention(q, k, v, segment_ids=ids, layout=self.layout, backend=self.backend)
        elif self.cached is None:
            out = attention(q, k, v, q_segments=ids, kv_segments=ids, causal=True, backend=self.backend)
        else:
            mask = _cache_mask(self.cached, ids, self.slot)
            out = masked_attention(q, k_all[layer], v_all[layer], mask)
        return hidden + block.attn.o_proj(out.reshape(*out.shape[:2], -1)), k_all, v_all


def _cache_mask(cached: jax.Array, segment_ids: jax.Array, slot) -> jax.Array:
    """bool[B, S, T]: new token s (in slot `slot + s`) sees the real tokens in slots up to its own."""
    slots = jnp.arange(cached.shape[1])
    own = slot + jnp.arange(segment_ids.shape[1])
    return (cached[:, None, :] == segment_ids[:, :, None]) & (slots[None, None] <= own[None, :, None])


def _gather_collected(outputs, cos, sin) -> dict:
    raw = jnp.concatenate([c[0] for _, _, c in outputs])
    after = jnp.concatenate([c[1] for _, _, c in outputs])
    routed = [c[2] for sparse, _, c in outputs if sparse]
    tensors = dict(layers=raw, layers_deepstack=after, text_cos=cos, text_sin=sin)
    if routed:
        names = ("router_logits", "router_weights", "router_index")
        tensors.update(zip(names, jax.tree.map(lambda *a: jnp.concatenate(a), *routed), strict=True))
    return tensors
