"""Index arrays of the vision tower against brute force, and packing into frames."""

from __future__ import annotations

import numpy as np
import pytest

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.grids import (
    VisionGeometry,
    merge_order,
    pack_vision,
    position_taps,
    window_ids,
    window_order,
)

GEOMETRY = VisionGeometry(merge_size=2, position_side=6, window=0)


def test_merge_order_keeps_blocks_together():
    order = merge_order(4, 6, 2)
    blocks = order.reshape(-1, 4, 2)
    assert [tuple(b[0]) for b in blocks] == [(r, c) for r in (0, 2) for c in (0, 2, 4)]
    assert (blocks[:, 3] - blocks[:, 0] == 1).all()
    assert len({tuple(p) for p in order}) == 24
    with pytest.raises(ValueError, match="3x4 patches cannot be merged"):
        merge_order(3, 4, 2)


@pytest.mark.parametrize(("h", "w", "side"), [(4, 6, 48), (48, 48, 48), (60, 34, 48), (2, 2, 5), (6, 4, 3)])
def test_position_taps_are_bilinear_with_aligned_corners(h, w, side):
    index, weight = position_taps(h, w, 2, side)
    table = np.random.default_rng(0).normal(size=side * side)
    ours = (table[index] * weight).sum(1)
    plane = table.reshape(side, side)
    for (r, c), value in zip(merge_order(h, w, 2).tolist(), ours, strict=True):
        y, x = r * (side - 1) / max(h - 1, 1), c * (side - 1) / max(w - 1, 1)
        rows = [np.interp(x, np.arange(side), plane[k]) for k in range(side)]
        assert value == pytest.approx(np.interp(y, np.arange(side), rows), abs=2e-4)
    np.testing.assert_allclose(weight.sum(1), 1, atol=1e-6)


def test_windows_tile_from_the_top_left_and_may_be_smaller_at_the_edges():
    ids = window_ids(12, 20, 2, 4)  # merged grid 6 x 10: windows of 4 -> 2 x 3
    rc = merge_order(12, 20, 2) // 8
    np.testing.assert_array_equal(ids, rc[:, 0] * 3 + rc[:, 1])
    assert np.bincount(ids).tolist() == [64, 64, 32, 32, 32, 16]
    order = window_order(12, 20, 2, 4)
    assert sorted(order.tolist()) == list(range(60)) and order[:5].tolist() == [0, 1, 2, 3, 10]


def test_packing_places_every_patch_and_marks_padding():
    grids = [Grid("video", 2, 4, 4), Grid("image", 1, 2, 6)]
    patches = np.arange(44 * 3, dtype=np.float32).reshape(44, 3) + 1
    packed, rows = pack_vision(patches, grids, GEOMETRY, frames=5, frame_patches=20)
    assert packed.patches.shape == (5, 20, 3)
    np.testing.assert_array_equal(packed.patches[1, :16], patches[16:32])
    np.testing.assert_array_equal(packed.patches[2, :12], patches[32:])
    assert packed.frame_segments.sum(1).tolist() == [16, 16, 12, 0, 0]
    assert (packed.patches[packed.frame_segments == 0] == 0).all()
    assert rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    assert packed.window_segments is None and packed.table_index.shape == (5, 20, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(frames=2), "bucket of 2 frames x 16 patches cannot hold 3 frames"),
        (dict(frame_patches=12), "cannot hold 3 frames of up to 16"),
        (dict(frame_patches=18), "multiple of 4"),
    ],
)
def test_buckets_that_are_too_small(kwargs, message):
    grids = [Grid("video", 2, 4, 4), Grid("image", 1, 2, 6)]
    with pytest.raises(ValueError, match=message):
        pack_vision(np.zeros((44, 3), np.float32), grids, GEOMETRY, **kwargs)
    with pytest.raises(ValueError, match="43 patches do not match"):
        pack_vision(np.zeros((43, 3), np.float32), grids, GEOMETRY)
