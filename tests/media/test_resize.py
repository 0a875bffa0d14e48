"""Sizes against recorded tables, pixels bit for bit against recorded torchvision output and against torch."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mllm4d_jax.media import resize
from mllm4d_jax.media.resize import ResizeRule, SizeError, resize_bicubic


def check(rows, size):
    """Every row of a table holds; rows that record an error raise SizeError."""
    assert rows
    for row in rows:
        if isinstance(row["out"], dict):
            with pytest.raises(SizeError):
                size(row)
        else:
            assert list(size(row)) == row["out"], row


def test_image_sizes(golden):
    check(
        golden("smart_resize.json")["image"],
        lambda r: resize.image_size(r["h"], r["w"], r["factor"], r["min_pixels"], r["max_pixels"]),
    )


def test_video_sizes(golden):
    def size(r):
        rule = ResizeRule("total", r["factor"], r["temporal_factor"], r["min_pixels"], r["max_pixels"])
        return rule.size(r["t"], r["h"], r["w"])

    check(golden("smart_resize.json")["video_qwen3_vl"], size)


def test_utils_image_sizes(golden):
    rows = golden("smart_resize.json")["image_qwen_vl_utils_default_budget"]
    check(rows, lambda r: resize.utils_image_size(r["h"], r["w"], r["factor"]))


def test_utils_frame_sizes(golden):
    rows = golden("smart_resize.json")["video_frame_qwen_vl_utils_default_budget"]
    check(rows, lambda r: ResizeRule("qwen_vl_utils", r["factor"], 2, None, None).size(r["t"], r["h"], r["w"]))
    for r in rows:
        assert resize.utils_frame_budget(r["t"], r["factor"]) == (r["min_pixels"], r["max_pixels"])


def test_utils_frame_sizes_with_a_budget_of_the_user(golden):
    """The package's own bound of a clip of so many frames holds beside max_pixels."""
    rows = golden("smart_resize.json")["video_frame_qwen_vl_utils_given_budget"]

    def rule(r):
        return ResizeRule("qwen_vl_utils", r["factor"], 2, r["min_pixels"], r["max_pixels"])

    check(rows, lambda r: rule(r).size(r["t"], r["h"], r["w"]))
    capped = [r for r in rows if (r["max_pixels"] or 0) > rule(r).largest_frame(r["t"]) + r["factor"] ** 2]
    assert len(capped) > 40
    for r in capped:
        assert resize.utils_frame_budget(r["t"], r["factor"], r["min_pixels"], 10**9)[1] < r["max_pixels"]


@pytest.mark.parametrize("h, w", [(480, 854), (854, 480), (4320, 7680), (10, 200), (8, 8), (224, 224), (1080, 1920)])
def test_per_frame_rule_keeps_its_budget(h, w):
    rule = ResizeRule("per_frame", 32, 2, 784, 50176)
    new_h, new_w = rule.size(32, h, w)
    assert new_h % 32 == 0 and new_w % 32 == 0 and 0 < new_h * new_w <= 50176
    assert (new_h <= new_w) == (h <= w)
    assert rule.size(2, h, w) == (new_h, new_w)


def test_utils_rule_never_returns_an_empty_frame():
    with pytest.raises(SizeError):
        resize.utils_image_size(30, 5000, 28, 3136, 20000)


def test_recorded_pixels(golden):
    data = golden("resize_uint8_bicubic.npz")
    pairs = [(data[f"in_{i}"], data[f"torchvision_{i}"]) for i in range(5)]
    for name in ("video_budget", "video_even", "video_noresize", "video_odd", "video_qwen2_5"):
        pairs.append((golden(f"{name}.npz")["frames"], golden(f"{name}.npz")["resized"]))
    pairs.append((golden("image.npz")["image"], golden("image.npz")["resized"]))
    for source, expected in pairs:
        np.testing.assert_array_equal(resize_bicubic(source, *expected.shape[-3:-1]), expected)


@pytest.mark.parametrize("seed", range(12))
def test_pixels_equal_torch(seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    h, w, new_h, new_w = rng.integers(3, 400, 4).tolist()
    if seed == 0:
        h, w, new_h, new_w = 1100, 2300, 32, 64  # shrinks enough for the wide accumulator
    if seed == 1:
        new_h = h  # one axis alone
    frames = rng.integers(0, 2, (2, h, w, 3), dtype=np.uint8) * 255  # noise at the limits provokes over- and undershoot
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(planes, (new_h, new_w), mode="bicubic", antialias=True)
    np.testing.assert_array_equal(resize_bicubic(frames, new_h, new_w), expected.permute(0, 2, 3, 1).numpy())


def test_accumulator_is_exact(monkeypatch):
    """The narrow accumulator is only chosen where its sums are exact integers."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 90, 160, 3), dtype=np.uint8)
    narrow = resize_bicubic(frames, 64, 96)
    assert (
        resize._taps(854, 288).dtype == np.float32 == resize._taps(160, 96).dtype
        and resize._taps(7680, 288).dtype == np.float64
    )
    taps = resize._taps

    def wide(size_in, size_out):
        t = taps(size_in, size_out)
        bands = tuple((o, i, w.astype(np.float64), rest.astype(np.float64)) for o, i, w, rest in t.bands)
        return resize._Taps(bands, t.outputs, t.shift, np.dtype(np.float64))

    monkeypatch.setattr(resize, "_taps", wide)
    np.testing.assert_array_equal(resize_bicubic(frames, 64, 96), narrow)


def test_strips_and_layout_do_not_matter(monkeypatch):
    frames = np.random.default_rng(1).integers(0, 256, (3, 70, 50, 3), dtype=np.uint8)
    whole = resize_bicubic(frames, 32, 64)
    monkeypatch.setattr(resize, "_STRIP_BYTES", 4096)
    np.testing.assert_array_equal(resize_bicubic(frames, 32, 64), whole)
    np.testing.assert_array_equal(resize_bicubic(frames[:, :, :, ::-1], 32, 64), whole[..., ::-1])
    np.testing.assert_array_equal(resize_bicubic(frames[1], 32, 64), whole[1])


def test_same_size_is_a_copy_and_bad_input_is_refused():
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    assert resize_bicubic(frames, 32, 32) is not frames
    with pytest.raises(ValueError, match="u8"):
        resize_bicubic(frames.astype(np.float32), 16, 16)


def test_a_clip_resizes_in_interactive_time():
    """About 0.15 s on one core; the bound leaves room for a busy machine, not for a per-pixel loop."""
    frames = np.zeros((32, 480, 854, 3), np.uint8)
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        resize_bicubic(frames, 160, 288)
        best = min(best, time.process_time() - start)
    assert best < 1.0
