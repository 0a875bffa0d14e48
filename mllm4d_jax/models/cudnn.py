"""cuDNN's flash attention: one forward and one backward kernel, without asking this process for a device.

`jax.nn.dot_product_attention` hides what a merge of partial results needs, the log-sum-exp with a backward pass that
takes one from outside, and refuses to be traced for a GPU that is not here. The primitives beneath it are private to
JAX, so `problem` says whether this release has them in the form that is used here; `attention.choose_backend` asks.

Lengths are given for every call that is not causal. cuDNN masks the end of its last tile of keys only where it knows of
lengths or of causality; with a bias alone, gradients became NaN at `length % 128 == 64` (pytorch#196678) and for one
query (cudnn-frontend#1072).
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp

HIDDEN = -(2.0**40)  # bias of a key that is not seen
HIDDEN_HALF = -(2.0**14)  # the same in float16, which ends at 2^16
HEAD_DIM = 8  # head sizes are padded to a multiple of it


def largest_head_dim(compute_capability: float) -> int:
    """Return the largest head size that forward and backward take (cuDNN's support matrix)."""
    return 256 if compute_capability >= 9.0 else 128


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute softmax(q k^T d^-0.5) v for every query, padded or not.

    Args:
      q: [B, S, N, d]; k, v: [B, T, K, d] with N a multiple of K; bfloat16 or float16.
      causal: query s sees keys t <= s.
      lengths: i32[B], at least 1: row b sees keys t < lengths[b]; None for all.
      mask: bool[B, S, T], True where visible; None for all. Costs an array of that size in the dtype of q.

    Returns:
      (out [B, S, N, d], f32[B, N, S] natural logarithm of each query's sum of exponentials).
    """
    d = q.shape[3]
    operands, options = _call(q, k, v, causal, lengths, mask)
    out, lse = _primitives().forward.bind(*operands, **options, is_training=True)
    return out[..., :d], lse


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    causal: bool,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v from what `forward` returned and the gradient of its `out`.

    With P = exp(scores - lse), they are those of P v where `out` and `lse` are of a softmax over more keys than these.
    """
    d = q.shape[3]
    operands, options = _call(q, k, v, causal, lengths, mask)
    grads = _primitives().backward.bind(*operands, lse, _pad(out), _pad(dout.astype(q.dtype)), **options)
    return tuple(g[..., :d] for g in grads)


def problem() -> str | None:
    """Return why the kernels cannot be used with this release of JAX, None if they can.

    A small program with both is lowered for CUDA, which takes no GPU.
    """
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def both(q, lengths):
        out, lse = forward(q, q, q, causal=False, lengths=lengths)
        return backward(q, q, q, out, lse, out, causal=False, lengths=lengths)

    try:
        text = jax.jit(both).trace(x, lengths).lower(lowering_platforms=("cuda",)).as_text()
    except Exception as error:  # whatever a changed private interface may raise
        return f"jax {jax.__version__} offers cuDNN's attention in another form ({type(error).__name__}: {error})"
    return None if "__cudnn$fmhaSoftmaxBackward" in text else f"jax {jax.__version__} lowers it to something else"


class _Primitives:
    """JAX's names, imported when first used: a platform without them is no reason not to import this module."""

    def __init__(self) -> None:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        self.forward, self.backward = fused._dot_product_attention_fwd_p, fused._dot_product_attention_bwd_p
        self.masks, self.layout = fused.MaskType, fused.AttentionLayout.BTNH.value
        # Since jax 0.12 scores may be changed by a function; there is none.
        known = inspect.signature(fused._dot_product_attention_fwd_cuda_lowering).parameters
        self.unused = {name: None for name in ("score_mod_name", "score_mod_jaxpr") if name in known}


@functools.cache
def _primitives() -> _Primitives:
    return _Primitives()


def _call(q, k, v, causal, lengths, mask) -> tuple[list[jax.Array], dict]:
    """Operands and parameters that both kernels take."""
    masks, unused = _primitives().masks, jnp.zeros(0, q.dtype)
    kinds = {(False, False): masks.NO_MASK, (True, False): masks.CAUSAL}
    kinds |= {(False, True): masks.PADDING, (True, True): masks.PADDING_CAUSAL}
    if lengths is None and not causal:
        lengths = jnp.full(q.shape[0], k.shape[1], jnp.int32)
    bias, counts = unused, [unused, unused]
    if mask is not None:
        hidden = HIDDEN_HALF if q.dtype == jnp.float16 else HIDDEN
        bias = jnp.where(mask[:, None], 0, hidden).astype(q.dtype)
    if lengths is not None:
        counts = [jnp.full(q.shape[0], q.shape[1], jnp.int32), lengths]
    options = dict(
        scale=q.shape[3] ** -0.5,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(mask is not None, False),  # a bias; its gradient
        mask_type=kinds[causal, lengths is not None],
        layout=_primitives().layout,
        sliding_window_length=None,
        **_primitives().unused,
    )
    # After the lengths: where packed sequences and pages begin, of which there are none.
    return [_pad(q), _pad(k), _pad(v), bias, *counts, *[unused] * 4], options


def _pad(x: jax.Array) -> jax.Array:
    """The head size up to a multiple of 8; zeros change no product."""
    pad = -x.shape[-1] % HEAD_DIM
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x
