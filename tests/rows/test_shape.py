"""The sizes that rows are padded to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from configs.published import published_config
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.rows.rows import RowSizes
from mllm4d_jax.rows.shape import RowShape, RowShapeError, bucket


def shape(prefix, branch, **sizes):
    return RowShape(VisionGeometry(2, 8, 0), (1, 2), 1536, prefix, branch, **sizes)


def test_bucket_sizes():
    assert [bucket(n, 2) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert sorted({bucket(n, 4) for n in range(8, 65)}) == [8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    for n in range(1, 3000):
        assert n <= bucket(n, 2) <= 1.5 * n and n <= bucket(n, 4) <= 1.25 * n and n <= bucket(n, 1) < 2 * n


def test_a_full_step_is_not_padded_in_slots_and_frames():
    """Rows of two clips of 96 frames of 224 x 224 with 20 questions in all."""
    rows = shape((1024, 2048), (64, 128), clips=2, branches=10, clip_frames=48, frame_patches=196)
    needed = RowSizes(prefix=900, slots=20, length=90, frames=96, frame_patches=196, supervised=300)
    assert rows.sizes(needed) == RowSizes(1024, 20, 128, 96, 196, 1024)
    smaller = RowSizes(prefix=2049, slots=17, length=129, frames=90, frame_patches=180, supervised=1)
    assert rows.sizes(smaller) == RowSizes(4096, 20, 256, 96, 196, 16)
    assert rows.sizes(dataclasses.replace(smaller, frames=60, frame_patches=120)).frames == 64
    assert rows.sizes(dataclasses.replace(smaller, frames=60, frame_patches=120)).frame_patches == 128
    assert rows.sizes(RowSizes(1, 5, 1, 0, 0, 1)) == RowSizes(1024, 5, 64, 0, 0, 16)


@pytest.mark.parametrize(("clips", "packed"), [(1, False), (1, True), (2, False), (2, True)])
def test_a_run_with_several_clips_a_row_has_one_form_of_rows(clips, packed):
    """Steps in which they happen to be alone are compiled like the others; hosts hand on 0 and 1."""
    rows = shape((8,), (8,), clips=clips)
    made = rows.sizes(RowSizes(1, 1, 1, 0, 0, 1, packed=int(packed)))
    assert made.packed is made.layout.packed is (packed or clips > 1)
    assert rows.largest(4, 4, 4).packed == (clips > 1)


def test_every_size_holds_what_it_must_and_shapes_are_few():
    rows = shape((256, 512, 1024), (32, 64, 128), branches=8, clip_frames=64)
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(2000):
        needed = RowSizes(
            int(rng.integers(200, 1100)), int(rng.integers(6, 9)), int(rng.integers(20, 140)),
            int(rng.integers(40, 65)), 4 * int(rng.integers(30, 50)), int(rng.integers(8, 40)),
        )  # fmt: skip
        got = rows.sizes(needed)
        held = zip(dataclasses.astuple(got), dataclasses.astuple(needed), strict=True)
        assert all(ours >= wanted for ours, wanted in held) and got.frame_patches % 4 == 0
        assert rows.sizes(got) == got  # agreeing on padded sizes is agreeing on sizes
        shapes.add((got.frames, got.frame_patches))
    assert len(shapes) <= 2 * 3


def test_lists_of_supervised_tokens():
    rows = shape((8,), (8,))
    sizes = [rows.sizes(RowSizes(1, 1, 1, 0, 0, n)).supervised for n in range(1, 20_000)]
    assert sorted(set(sizes))[:6] == [16, 64, 256, 1024, 1536, 2048]
    assert all(n <= size <= max(4 * n, 16) and (n <= 1024 or size <= 1.5 * n) for n, size in enumerate(sizes, 1))


@pytest.mark.parametrize("sizes", [(), (16, 8), (0, 8), (8, 8)])
def test_bad_lists(sizes):
    with pytest.raises(RowShapeError, match="prefix buckets must be positive, ascending"):
        shape(sizes, (8,))
    with pytest.raises(RowShapeError, match="branch"):
        shape((8,), sizes)


RULES = [
    dict(),
    dict(max_pixels=100_352),
    dict(resize_rule="total"),
    dict(resize_rule="total", max_pixels=802_816),
    dict(resize_rule="total", max_pixels=802_816, min_pixels=200_704),
    dict(resize_rule="qwen_vl_utils"),
    dict(resize_rule="qwen_vl_utils", max_pixels=401_408),
]


@pytest.mark.parametrize("family", ["8b", "qwen2_5_vl_7b"])
@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("frames", [2, 7, 16, 32])
def test_no_frame_of_a_full_clip_is_larger_than_the_largest(family, options, frames):
    """Every source size that is not a sliver, against the processor's own rule; and some reach the bound, nearly."""
    processor = ProcessorConfig.of(published_config(family), family)
    video = VideoOptions(num_frames=frames, **options)
    rule: ResizeRule = video.resize_for(processor)
    most, seen = rule.largest_frame(frames), []
    sides = (48, 224, 360, 480, 640, 720, 1080, 1920, 2160, 3840)
    for h, w in [(h, w) for h in sides for w in sides if max(h, w) <= 16 * min(h, w)]:
        seen.append(int(np.prod(rule.size(frames, h, w))))
    assert max(seen) <= most and max(seen) >= 0.9 * most
    geometry = VisionGeometry(2, 8, 0)
    made = RowShape.of(processor, geometry, video, prefix_lengths=(64,), branch_lengths=(64,))
    assert made.frame_patches == most // processor.patch_size**2 and made.clip_frames == -(-frames // 2)
    full = RowSizes(1, 1, 1, made.clip_frames, made.frame_patches, 1)
    assert made.sizes(full).frame_patches == made.frame_patches and made.sizes(full).frames == made.clip_frames
