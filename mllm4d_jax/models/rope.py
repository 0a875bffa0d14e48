"""Rotary embeddings: 3-axis M-RoPE of the text decoder and the 2-D rotation of the vision tower."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mllm4d_jax.models.config import RopeConfig

VISION_THETA = 10000.0  # fixed in every release, not a configuration key


def frequency_axes(sections: tuple[int, int, int], interleaved: bool) -> np.ndarray:
    """Which position row (0: T, 1: H, 2: W) drives each rotary frequency.

    Interleaved (Qwen3-VL): start from all T; H takes the indices 1, 4, 7, ... below 3*sections[1], W takes 2, 5, 8, ...
    below 3*sections[2]. Contiguous (Qwen2.5-VL): a run of T, then H, then W.

    Returns:
      i32[head_dim/2].
    """
    axes = np.repeat(np.arange(3, dtype=np.int32), sections)
    if not interleaved:
        return axes
    axes = np.zeros(sum(sections), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies and the factor on cos/sin.

    Plain RoPE: `theta^(-2i/head_dim)`. YaRN (arXiv 2309.00071, eq. 17-23): high frequencies are kept, low ones divided
    by `factor`, with a linear ramp between the dimensions that turn `beta_fast` and `beta_slow` times within the
    original context.

    Returns:
      (f32[head_dim/2], attention factor).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = (1.0 / np.float32(config.theta) ** exponents).astype(np.float32)
    if config.yarn is None:
        return inv_freq, 1.0
    p = dict(config.yarn)
    factor = p["factor"]
    context = p["original_max_position_embeddings"]

    def dimension_turning(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_turning(p.get("beta_fast") or 32.0), dimension_turning(p.get("beta_slow") or 1.0)
    if p.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    interpolated = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    inv_freq = inv_freq * (1 - interpolated) + inv_freq / factor * interpolated
    scale = p.get("attention_factor")
    if scale is None:

        def mscale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        both = p.get("mscale") and p.get("mscale_all_dim")
        scale = mscale(p["mscale"]) / mscale(p["mscale_all_dim"]) if both else mscale(1.0)
    return inv_freq.astype(np.float32), float(scale)


def text_rope(config: RopeConfig, head_dim: int, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the text decoder.

    Args:
      positions: i32[3, B, S], rows T, H, W.
      dtype: activation dtype; angles are fp32 and only the tables are cast, as in the reference.

    Returns:
      (cos, sin), each dtype[B, S, head_dim], the half vector repeated.
    """
    inv_freq, scale = inverse_frequencies(config, head_dim)
    axes = frequency_axes(config.sections, config.interleaved)
    chosen = jnp.moveaxis(positions, 0, -1)[..., axes].astype(jnp.float32)  # [B,S,head_dim/2]
    angles = chosen * inv_freq
    angles = jnp.concatenate([angles, angles], axis=-1)
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def vision_rope(head_dim: int, rowcol: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the vision tower, always fp32.

    Args:
      rowcol: i32[F, L, 2], patch row and column inside its frame.

    Returns:
      (cos, sin), each f32[F, L, head_dim]: angles are row frequencies then column frequencies, repeated.
    """
    exponents = np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2)
    inv_freq = (1.0 / np.float32(VISION_THETA) ** exponents).astype(np.float32)
    angles = rowcol[..., None].astype(jnp.float32) * inv_freq  # [F,L,2,head_dim/4]
    angles = angles.reshape(*rowcol.shape[:-1], head_dim // 2)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Split-half rotation of x [..., S, heads, head_dim] by tables [..., S, head_dim]."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
