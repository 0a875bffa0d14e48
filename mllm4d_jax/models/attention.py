"""One attention function with segment ids, three backends.

A query sees a key when both carry the same segment id and, if causal, the key does not come later. Segment ids are
mandatory: packing, padding and the one-frame-only rule of the vision tower are all expressed by them, so no call site
can forget a mask. Id 0 is padding by convention; padded queries see padded keys, which keeps their softmax finite.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BACKENDS = ("auto", "xla", "cudnn", "splash")
_SPLASH_LANES = 128  # sequence blocks of the TPU kernel are multiples of the vector lanes


class BackendError(ValueError):
    """The requested attention backend cannot run here. The message says why and what to use."""


def resolve_backend(requested: str, dtype, platform: str | None = None) -> str:
    """Chooses the attention backend for this process.

    Args:
      requested: "auto", or one of "xla", "cudnn", "splash" to insist.
      dtype: activation dtype.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.

    Returns:
      "xla", "cudnn" or "splash". "auto" is splash on TPU, cudnn on GPUs of compute capability 8.0 or more for 16-bit
      activations, xla elsewhere.

    Raises:
      BackendError: unknown name, or a backend that this platform or dtype cannot run.
    """
    if requested not in BACKENDS:
        raise BackendError(f"unknown attention backend {requested!r} (known: {', '.join(BACKENDS)})")
    platform = platform or jax.default_backend()
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    if requested == "auto":
        if platform == "tpu":
            return "splash"
        return "cudnn" if platform == "gpu" and half and _compute_capability() >= 8.0 else "xla"
    if requested == "splash" and platform != "tpu":
        raise BackendError(
            f"attention='splash' is a TPU kernel and this process runs on {platform}: use 'auto' or 'xla'"
        )
    if requested == "cudnn":
        if platform != "gpu":
            raise BackendError(
                f"attention='cudnn' needs an NVIDIA GPU and this process runs on {platform}: use 'auto' or 'xla'"
            )
        if not half:
            raise BackendError(f"attention='cudnn' needs bfloat16 or float16 activations, got {jnp.dtype(dtype)}")
        if _compute_capability() < 8.0:
            raise BackendError("attention='cudnn' needs a GPU of compute capability 8.0 or more: use 'xla'")
    return requested


def _compute_capability() -> float:
    return float(getattr(jax.devices()[0], "compute_capability", 0.0))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    causal: bool,
    backend: str,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention within segments; scale head_dim^-0.5, softmax in fp32.

    Args:
      q: [B, S, N, d].
      k, v: [B, T, K, d] with N a multiple of K; key head j serves query heads j*N/K .. (j+1)*N/K - 1.
      q_segments, kv_segments: i32[B, S] and i32[B, T].
      causal: position s sees positions t <= s (needs S == T).
      backend: a name returned by `resolve_backend`.
      interpret: run the TPU kernel in the Pallas interpreter (tests on CPU).

    Returns:
      [B, S, N, d] in the dtype of q.
    """
    if backend == "splash":
        return _splash(q, k, v, q_segments, kv_segments, causal, interpret)
    mask = q_segments[:, :, None] == kv_segments[:, None, :]  # bool[B,S,T]
    if causal:
        mask &= jnp.tril(jnp.ones(mask.shape[1:], bool))
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    return masked_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Reference formula, also the decode path: heads come before positions in k and v, as in the KV cache.

    Args:
      q: [B, S, N, d]; k, v: [B, K, T, d]; mask: bool[B, S, T], True where visible.

    Returns:
      [B, S, N, d] in the dtype of q.
    """
    b, s, n, d = q.shape
    grouped = q.reshape(b, s, k.shape[1], n // k.shape[1], d)
    scores = jnp.einsum("bskgd,bktd->bkgst", grouped, k, preferred_element_type=jnp.float32) * d**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgst,bktd->bskgd", probs, v).reshape(b, s, n, d)


def _splash(q, k, v, q_segments, kv_segments, causal, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, s, n, d = q.shape
    t = k.shape[1]
    # Padding gets segment -1: it is seen by nothing real and its own rows are cut off below.
    q, q_segments = _pad_sequence(q, q_segments)
    k, kv_segments = _pad_sequence(k, kv_segments)
    v, _ = _pad_sequence(v, kv_segments[:, :t])
    sp, tp = q.shape[1], k.shape[1]
    head_mask = masks.CausalMask((sp, tp)) if causal else masks.FullMask((sp, tp))
    bq, bkv = _block(sp), _block(tp)
    blocks = kernel.BlockSizes(
        block_q=bq, block_kv=bkv, block_kv_compute=bkv,
        block_q_dkv=bq, block_kv_dkv=bkv, block_kv_dkv_compute=bkv,
        block_q_dq=bq, block_kv_dq=bkv,
    )  # fmt: skip
    with jax.ensure_compile_time_eval():
        attend = kernel.make_splash_mha(
            masks.MultiHeadMask([head_mask] * n),
            block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret,
        )  # fmt: skip

    def one(q1, k1, v1, qs, ks):
        return attend(q1, k1, v1, segment_ids=kernel.SegmentIds(q=qs, kv=ks))

    heads_first = [x.swapaxes(1, 2) for x in (q * d**-0.5, k, v)]
    out = jax.vmap(one)(*heads_first, q_segments, kv_segments)
    return out.swapaxes(1, 2)[:, :s].astype(q.dtype)


def _pad_sequence(x: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    pad = -x.shape[1] % _SPLASH_LANES
    if not pad:
        return x, segments
    return (
        jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))),
        jnp.pad(segments, ((0, 0), (0, pad)), constant_values=-1),
    )


def _block(length: int) -> int:
    return next(b for b in (512, 256, _SPLASH_LANES) if length % b == 0)
