"""The sizes that rows are padded to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mllm4d_jax.rows.buckets import BucketError, RowBuckets, bucket, largest
from mllm4d_jax.rows.rows import RowSizes


def test_bucket_sizes():
    assert [bucket(n, 2) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert sorted({bucket(n, 4) for n in range(8, 65)}) == [8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    for n in range(1, 3000):
        assert n <= bucket(n, 2) <= 1.5 * n and n <= bucket(n, 4) <= 1.25 * n and n <= bucket(n, 1) < 2 * n


def test_a_full_step_is_not_padded_in_slots_and_frames():
    """Rows of six clips of 32 frames of 224 x 224 with 20 questions in all."""
    buckets = RowBuckets((1024, 2048), (64, 128), 4, full_slots=20, full_frames=6 * 16, full_frame_patches=196)
    needed = RowSizes(prefix=900, slots=20, length=90, frames=96, frame_patches=196, supervised=300)
    assert buckets.sizes(needed) == RowSizes(1024, 20, 128, 96, 196, 1024)
    smaller = RowSizes(prefix=2049, slots=17, length=129, frames=90, frame_patches=180, supervised=1)
    assert buckets.sizes(smaller) == RowSizes(4096, 20, 256, 96, 196, 16)
    assert buckets.sizes(dataclasses.replace(smaller, frames=60, frame_patches=120)).frames == 64
    assert buckets.sizes(dataclasses.replace(smaller, frames=60, frame_patches=120)).frame_patches == 128
    assert buckets.sizes(RowSizes(1, 5, 1, 0, 0, 1)) == RowSizes(1024, 5, 64, 0, 0, 16)


def test_every_size_holds_what_it_must_and_shapes_are_few():
    buckets = RowBuckets((256, 512, 1024), (32, 64, 128), 4, full_slots=8, full_frames=64)
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(2000):
        needed = RowSizes(
            int(rng.integers(200, 1100)), int(rng.integers(6, 9)), int(rng.integers(20, 140)),
            int(rng.integers(40, 65)), 4 * int(rng.integers(30, 50)), int(rng.integers(8, 40)),
        )  # fmt: skip
        got = buckets.sizes(needed)
        assert largest([got, needed]) == got and got.frame_patches % 4 == 0
        assert buckets.sizes(got) == got  # agreeing on padded sizes is agreeing on sizes
        shapes.add((got.frames, got.frame_patches))
    assert len(shapes) <= 2 * 3


def test_lists_of_supervised_tokens():
    buckets = RowBuckets((8,), (8,))
    sizes = [buckets.sizes(RowSizes(1, 1, 1, 0, 0, n)).supervised for n in range(1, 20_000)]
    assert sorted(set(sizes))[:6] == [16, 64, 256, 1024, 1536, 2048]
    assert all(n <= size <= max(4 * n, 16) and (n <= 1024 or size <= 1.5 * n) for n, size in enumerate(sizes, 1))


def test_largest_is_by_size():
    a, b = RowSizes(1, 2, 3, 4, 5, 6), RowSizes(6, 5, 4, 3, 2, 1)
    assert largest([a, b]) == RowSizes(6, 5, 4, 4, 5, 6)


@pytest.mark.parametrize("sizes", [(), (16, 8), (0, 8), (8, 8)])
def test_bad_lists(sizes):
    with pytest.raises(BucketError, match="prefix buckets must be positive, ascending"):
        RowBuckets(sizes, (8,))
    with pytest.raises(BucketError, match="branch"):
        RowBuckets((8,), sizes)
