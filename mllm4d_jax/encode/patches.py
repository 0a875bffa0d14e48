"""Resized frames to the flat patch matrix of the vision tower."""

from __future__ import annotations

import numpy as np

from mllm4d_jax.encode.processor_config import ProcessorConfig


def patchify(frames: np.ndarray, config: ProcessorConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Normalises frames and cuts them into patches, in merge-block order (Qwen-VL processors).

    A clip whose length is no multiple of temporal_patch_size repeats its last frame; a still image is a clip of one
    frame, so it is repeated throughout its temporal patch.

    Args:
      frames: u8[T, H, W, 3] RGB, H and W multiples of `config.factor`.

    Returns:
      (f32[t*h*w, 3*temporal_patch_size*patch_size^2], (t, h, w) in patches). A patch vector runs over channel, frame,
      pixel row, pixel column.

    Raises:
      ValueError: wrong dtype or shape, or sides that are no multiples of `config.factor`.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"expected u8[T, H, W, 3] with T > 0, got {frames.dtype}{list(frames.shape)}")
    _, height, width, _ = frames.shape
    if height % config.factor or width % config.factor:
        raise ValueError(f"frames of {height}x{width} pixels are no multiple of {config.factor}")
    tp, p, m = config.temporal_patch_size, config.patch_size, config.merge_size
    short = -len(frames) % tp
    if short:
        frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    t, h, w = len(frames) // tp, height // p, width // p
    blocks = frames.reshape(t, tp, h // m, m, p, w // m, m, p, 3)
    blocks = np.ascontiguousarray(blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)).reshape(t * h * w, 3, -1)
    patches = np.empty(blocks.shape, np.float32)
    for channel, levels in enumerate(normalised_levels(config)):
        patches[:, channel] = levels[blocks[:, channel]]
    return patches.reshape(t * h * w, -1), (t, h, w)


def normalised_levels(config: ProcessorConfig) -> np.ndarray:
    """Value of each pixel level after normalisation, `(x - 255*mean) / (255*std)` in fp32: f32[3, 256]."""
    levels = np.arange(256, dtype=np.float32)
    mean = np.array(config.image_mean, np.float32) * np.float32(255)
    std = np.array(config.image_std, np.float32) * np.float32(255)
    return (levels - mean[:, None]) / std[:, None]
