"""Text decoder: one scanned stack of blocks for training and prefill, with DeepStack inside the scan.

Decoding feeds the same blocks one token at a time, see `generate/decoding.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mllm4d_jax.models import rope
from mllm4d_jax.models.attention import Backend
from mllm4d_jax.models.config import TextConfig
from mllm4d_jax.models.layers import (
    PRODUCT,
    GatedMLP,
    Linear,
    RMSNorm,
    fold,
    parameter,
    scan_layers,
    stack,
)
from mllm4d_jax.models.shared_prefix import row_attention
from mllm4d_jax.models.sparse import RouterStats, SparseMLP
from mllm4d_jax.parallel.rules import constrain_rows
from mllm4d_jax.rows.batch import RowLayout


class KVCache(NamedTuple):
    """Keys and values of all layers; heads come before positions, as the products of attention want them."""

    k: jax.Array  # [layers, B, K, S, head_dim] in the activation dtype, rotated
    v: jax.Array  # the same, not rotated


class DecoderOutput(NamedTuple):
    """Result of a decoder pass."""

    hidden: jax.Array  # [B, S, H] after the final norm
    cache: KVCache | None  # keys and values of the S tokens, None unless asked for
    router: RouterStats | None  # with a leading layer dimension, None for dense models
    collected: dict  # intermediate tensors, empty unless asked for


def run_lengths(config: TextConfig) -> list[tuple[int, int, bool]]:
    """Layers grouped into (start, count, sparse) runs of one kind; each run is one scanned stack."""
    runs = ((sparse, list(layers)) for sparse, layers in itertools.groupby(range(config.num_layers), config.sparse))
    return [(layers[0], len(layers), sparse) for sparse, layers in runs]


class SelfAttention(nnx.Module):
    """Grouped-query attention with per-head q/k norms (Qwen3) or biases (Qwen2.5)."""

    def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
        h, d, kw = config.hidden_size, config.head_dim, dict(dtype=dtype, rngs=rngs)
        nq, nk = config.num_heads * d, config.num_kv_heads * d
        self.q_proj = Linear(h, nq, axes=("embed", "heads"), bias=config.qkv_bias, **kw)
        self.k_proj = Linear(h, nk, axes=("embed", "kv"), bias=config.qkv_bias, **kw)
        self.v_proj = Linear(h, nk, axes=("embed", "kv"), bias=config.qkv_bias, **kw)
        self.o_proj = Linear(nq, h, axes=("heads", "embed"), bias=config.o_bias, name=None, **kw)
        self.q_norm = RMSNorm(d, config.rms_norm_eps, **kw) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps, **kw) if config.qk_norm else None
        self.head_dim = d

    def project(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B,S,H] -> rotated q [B,S,N,d] and k [B,S,K,d], and v [B,S,K,d]; `key` as in `Linear`."""
        layers = enumerate((self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (p(x, fold(key, n)).reshape(*x.shape[:2], -1, self.head_dim) for n, p in layers)
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

    def attend(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attention: Callable, key: jax.Array | None):
        """First half of the block; `attention` of (q, k, v). Returns (x, k, v)."""
        q, k, v = self.attn.project(self.input_norm(x), cos, sin, key)
        out = attention(q, k, v)
        x = x + self.attn.o_proj(out.reshape(*out.shape[:2], -1), fold(key, 3))
        return checkpoint_name(x, PRODUCT), k, v

    def feed_forward(self, x: jax.Array, real: jax.Array, backend: Backend, key: jax.Array | None = None):
        """Second half of the block; returns (x, router statistics or None, router tensors or None)."""
        y = self.post_norm(x)
        if not self.sparse:
            return x + self.mlp(y, key), None, None
        y, stats, routed = self.mlp(y, real, backend)
        return x + y, stats, routed


class Decoder(nnx.Module):
    """Embedding table, block stacks and final norm."""

    def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
        self.embed = parameter(rngs, (config.vocab_size, config.hidden_size), dtype, ("vocab", "embed"))

        def blocks(count: int, sparse: bool) -> nnx.Module:
            return stack(lambda r: DecoderBlock(config, sparse, dtype=dtype, rngs=r), count, rngs)

        self.stacks = nnx.List([blocks(count, sparse) for _, count, sparse in run_lengths(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        backend: Backend,
        layout: RowLayout | None = None,
        deepstack: jax.Array | None = None,
        keep_cache: bool = False,
        remat: str = "none",
        collect: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> DecoderOutput:
        """Runs the blocks.

        Args:
          x: [B, S, H] input embeddings.
          positions: i32[3, B, S].
          segment_ids: i32[B, S], 0 for padding; tokens of different segments do not see each other.
          backend: see `attention`.
          layout: of shared-prefix rows; None for rows that are one causal sequence.
          deepstack: [K, B, S, H], row j added to the hidden states after layer j; zero away from visual tokens.
          keep_cache: return the keys and values too (prefill).
          collect: return layer outputs and router tensors too (parity checks).
          dropout_key: random key of the adapters' dropout; None outside training.

        Raises:
          ValueError: rows that are not as long as the layout.
        """
        config, taps = self.config, 0 if deepstack is None else len(deepstack)
        cos, sin = rope.text_rope(config.rope, config.head_dim, positions, x.dtype)
        attend = functools.partial(row_attention, segment_ids=segment_ids, layout=layout, backend=backend)

        def step(block: DecoderBlock, hidden: jax.Array, layer: jax.Array):
            """Hidden states before `layer` -> those after it, and what the scan stacks."""
            attention_key, mlp_key = (fold(fold(dropout_key, layer), half) for half in range(2))
            hidden, k, v = block.attend(hidden, cos, sin, attend, attention_key)
            raw, stats, routed = block.feed_forward(hidden, segment_ids != 0, backend, mlp_key)
            hidden = raw
            if taps:
                hidden = raw + jnp.where(layer < taps, deepstack[jnp.minimum(layer, taps - 1)], 0)
            hidden = constrain_rows(hidden, backend.mesh)
            kept = KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2)) if keep_cache else None
            return hidden, (stats, kept, (raw, hidden, routed) if collect else None)

        hidden, outputs, caches = x, [], []
        for (start, count, sparse), blocks in zip(run_lengths(config), self.stacks, strict=True):
            layers = start + jnp.arange(count)
            how = dict(remat=remat, unroll=backend.unroll and not keep_cache)
            hidden, (stats, kept, collected) = scan_layers(blocks, step, hidden, layers, **how)
            outputs.append((sparse, stats, collected))
            caches.append(kept)
        sparse_stats = [stats for sparse, stats, _ in outputs if sparse]
        router = jax.tree.map(lambda *a: jnp.concatenate(a), *sparse_stats) if sparse_stats else None
        tensors = _gather_collected(outputs, cos, sin) if collect else {}
        cache = jax.tree.map(lambda *a: a[0] if len(a) == 1 else jnp.concatenate(a), *caches) if keep_cache else None
        return DecoderOutput(self.norm(hidden), cache, router, tensors)


def _gather_collected(outputs, cos, sin) -> dict:
    raw = jnp.concatenate([c[0] for _, _, c in outputs])
    after = jnp.concatenate([c[1] for _, _, c in outputs])
    routed = [c[2] for sparse, _, c in outputs if sparse]
    tensors = dict(layers=raw, layers_deepstack=after, text_cos=cos, text_sin=sin)
    if routed:
        names = ("router_logits", "router_weights", "router_index")
        tensors.update(zip(names, jax.tree.map(lambda *a: jnp.concatenate(a), *routed), strict=True))
    return tensors
