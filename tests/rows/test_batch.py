"""Padding of examples to static shapes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.rows.batch import collate

GEOMETRY = VisionGeometry(merge_size=2, position_side=4, window=0)
VIDEO = 9


def example(tokens, grids=(), seed=0):
    n = sum(g.t * g.h * g.w for g in grids)
    positions = np.tile(np.arange(len(tokens)), (3, 1)) + seed
    patches = np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)
    return SimpleNamespace(key="k", tokens=np.array(tokens), positions=positions, grids=tuple(grids), patches=patches)


EXAMPLES = [example([1, 2, 3]), example([4, VIDEO, VIDEO, 5], [Grid("video", 2, 2, 2)], seed=7)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_and_visual_rows_point_at_their_patches(side):
    batch = collate(EXAMPLES, GEOMETRY, visual_token_ids=(8, VIDEO), length=6, frames=3, pad_side=side)
    start = 2 if side == "left" else 0
    assert batch.tokens[1].tolist()[start : start + 4] == [4, VIDEO, VIDEO, 5]
    np.testing.assert_array_equal(batch.segment_ids, batch.tokens > 0)
    assert batch.segment_ids.sum(1).tolist() == [3, 4]
    assert batch.positions[:, 1, start : start + 4].tolist() == [[7, 8, 9, 10]] * 3
    assert (batch.vision_index[0] == -1).all()
    assert batch.vision_index[1, start : start + 4].tolist() == [
        -1,
        3,
        4,
        -1,
    ]
    np.testing.assert_array_equal(batch.vision.patches[3:5].reshape(8, 5), EXAMPLES[1].patches)
    assert batch.vision.patches.shape == (6, 4, 5) and not batch.vision.patches[[0, 1, 2, 5]].any()


def test_text_alone_has_no_vision_input():
    assert collate([EXAMPLES[0]], GEOMETRY, visual_token_ids=(VIDEO,)).vision is None


def test_errors():
    with pytest.raises(ValueError, match="k: 4 tokens for rows of 3"):
        collate(EXAMPLES, GEOMETRY, visual_token_ids=(VIDEO,), length=3)
    with pytest.raises(ValueError, match="k: 1 visual placeholders for 2 merged patches"):
        collate([example([4, VIDEO, 5], [Grid("video", 2, 2, 2)])], GEOMETRY, visual_token_ids=(VIDEO,))
    with pytest.raises(ValueError, match="pad_side"):
        collate(EXAMPLES, GEOMETRY, visual_token_ids=(VIDEO,), pad_side="centre")
