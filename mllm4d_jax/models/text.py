"""Text decoder: one scanned stack of blocks for training and prefill, with DeepStack inside the scan.

Decoding feeds the same blocks one token at a time, see `generate/decoding.py`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mllm4d_jax.models import rope
from mllm4d_jax.models.attention import Backend, attention
from mllm4d_jax.models.config import TextConfig
from mllm4d_jax.models.layers import ATTENTION, GatedMLP, Linear, RMSNorm, fold, scan_layers, stack
from mllm4d_jax.models.moe import RouterStats, SparseMLP
from mllm4d_jax.models.shared_prefix import row_attention
from mllm4d_jax.parallel.rules import constrain_rows
from mllm4d_jax.rows.batch import RowLayout


class KVCache(NamedTuple):
    """Keys and values of all layers; heads come before positions, as the products of attention want them.

    Attributes:
      k, v: [layers, B, K, S, head_dim] in the activation dtype; keys are stored rotated.
    """

    k: jax.Array
    v: jax.Array


class DecoderOutput(NamedTuple):
    """Result of a decoder pass.

    Attributes:
      hidden: [B, S, H] after the final norm.
      cache: keys and values of the S tokens, None unless asked for.
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

    def feed_forward(self, x: jax.Array, real: jax.Array, key: jax.Array | None = None):
        """Second half of the block; returns (x, router statistics or None, router tensors or None)."""
        y = self.post_norm(x)
        if not self.sparse:
            return x + self.mlp(y, key), None, None
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
        config = self.config
        cos, sin = rope.text_rope(config.rope, config.head_dim, config.max_positions, positions, x.dtype)
        keep = dict(keep_cache=keep_cache, collect=collect)
        layer_pass = _LayerPass(cos, sin, segment_ids, backend, layout, deepstack, dropout_key, **keep)
        hidden, outputs, caches = x, [], []
        for (start, count, sparse), blocks in zip(run_lengths(config), self.stacks, strict=True):
            layers = start + jnp.arange(count)
            hidden, (stats, kept, collected) = scan_layers(blocks, layer_pass.step, hidden, layers, remat=remat)
            outputs.append((sparse, stats, collected))
            caches.append(kept)
        sparse_stats = [stats for sparse, stats, _ in outputs if sparse]
        router = jax.tree.map(lambda *a: jnp.concatenate(a), *sparse_stats) if sparse_stats else None
        tensors = _gather_collected(outputs, cos, sin) if collect else {}
        cache = jax.tree.map(lambda *a: a[0] if len(a) == 1 else jnp.concatenate(a), *caches) if keep_cache else None
        return DecoderOutput(self.norm(hidden), cache, router, tensors)


@dataclasses.dataclass(frozen=True)
class _LayerPass:
    """What every layer of one pass shares; `step` is the body of the scan."""

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array
    backend: Backend
    layout: RowLayout | None
    deepstack: jax.Array | None
    dropout_key: jax.Array | None
    keep_cache: bool
    collect: bool

    def step(self, block: DecoderBlock, hidden: jax.Array, layer: jax.Array):
        """Hidden states before `layer` -> those after it, and what the scan stacks."""
        attention_key, mlp_key = (fold(fold(self.dropout_key, layer), half) for half in range(2))
        hidden, kept = self._attend(block, hidden, attention_key)
        raw, stats, routed = block.feed_forward(hidden, self.segment_ids != 0, mlp_key)
        hidden = raw
        if self.deepstack is not None and len(self.deepstack):
            taps = len(self.deepstack)
            hidden = raw + jnp.where(layer < taps, self.deepstack[jnp.minimum(layer, taps - 1)], 0)
        hidden = constrain_rows(hidden, self.backend.mesh)
        return hidden, (stats, kept, (raw, hidden, routed) if self.collect else None)

    def _attend(self, block: DecoderBlock, hidden: jax.Array, key: jax.Array | None):
        q, k, v = block.attn.project(block.input_norm(hidden), self.cos, self.sin, key)
        ids = self.segment_ids
        if self.layout is not None:
            out = row_attention(q, k, v, segment_ids=ids, layout=self.layout, backend=self.backend)
        else:
            out = attention(q, k, v, q_segments=ids, kv_segments=ids, causal=True, backend=self.backend)
        out = checkpoint_name(out.reshape(*out.shape[:2], -1), ATTENTION)
        kept = KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2)) if self.keep_cache else None
        return hidden + block.attn.o_proj(out, fold(key, 3)), kept


def _gather_collected(outputs, cos, sin) -> dict:
    raw = jnp.concatenate([c[0] for _, _, c in outputs])
    after = jnp.concatenate([c[1] for _, _, c in outputs])
    routed = [c[2] for sparse, _, c in outputs if sparse]
    tensors = dict(layers=raw, layers_deepstack=after, text_cos=cos, text_sin=sin)
    if routed:
        names = ("router_logits", "router_weights", "router_index")
        tensors.update(zip(names, jax.tree.map(lambda *a: jnp.concatenate(a), *routed), strict=True))
    return tensors
