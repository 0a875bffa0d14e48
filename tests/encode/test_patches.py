"""Patch matrices against recorded processor output, and against the patch order spelled out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.grids import patchify, unpatchify


@pytest.mark.parametrize("name", ["video_budget", "video_even", "video_noresize", "video_odd", "video_qwen2_5"])
def test_recorded_videos(name, golden, qwen3, qwen2_5):
    data = golden(f"{name}.npz")
    patches, grid = patchify(data["resized"], qwen2_5 if name == "video_qwen2_5" else qwen3)
    assert list(grid) == data["video_grid_thw"][0].tolist()
    assert patches.dtype == np.float32
    np.testing.assert_allclose(patches, data["pixel_values_videos"], rtol=0, atol=1e-6)


def test_recorded_image(golden, qwen3):
    data = golden("image.npz")
    patches, grid = patchify(data["resized"][None], qwen3)
    assert list(grid) == data["image_grid_thw"][0].tolist()
    np.testing.assert_allclose(patches, data["pixel_values"], rtol=0, atol=1e-6)


def test_order_spelled_out(qwen2_5):
    """Other sizes than the published ones: patch 3, merge 2, three frames per temporal patch."""
    config = dataclasses.replace(qwen2_5, patch_size=3, temporal_patch_size=3)
    frames = np.random.default_rng(0).integers(0, 256, (4, 12, 18, 3), dtype=np.uint8)
    patches, grid = patchify(frames, config)
    assert grid == (2, 4, 6)
    padded = np.concatenate([frames, frames[-1:], frames[-1:]])
    mean, std = np.array(config.image_mean), np.array(config.image_std)
    expected = []
    for t in range(2):
        for block_row in range(2):
            for block_col in range(3):
                for r in range(2):
                    for c in range(2):
                        y, x = 3 * (2 * block_row + r), 3 * (2 * block_col + c)
                        cube = padded[3 * t : 3 * t + 3, y : y + 3, x : x + 3]
                        expected.append(((cube / 255 - mean) / std).transpose(3, 0, 1, 2).ravel())
    np.testing.assert_allclose(patches, np.array(expected), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(unpatchify(patches, Grid("video", *grid), config), padded)


@pytest.mark.parametrize("shape", [(2, 32, 40, 3), (0, 32, 32, 3), (2, 32, 32, 4), (32, 32, 3)])
def test_bad_shapes(shape, qwen3):
    with pytest.raises(ValueError):
        patchify(np.zeros(shape, np.uint8), qwen3)
