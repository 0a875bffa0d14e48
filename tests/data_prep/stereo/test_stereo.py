"""Disparity, depth and the whole stage against rendered clips whose truth is exact."""

from __future__ import annotations

import dataclasses
import json

import cv2
import numpy as np
import pytest

from benchmarks.stereo_accuracy import photo_scene
from data_prep.scenes.objects import Caption
from data_prep.scenes.scene import intrinsics_of
from data_prep.stereo import disparity as disparity_module
from data_prep.stereo.disparity import StereoError, depth_from_disparity, match_pair, split_side_by_side
from data_prep.stereo.quality import Quality, QualityLimits, require_quality
from data_prep.stereo.stage import reconstruct_clip
from tests.data_prep.stereo.stereo_world import make_clip


@pytest.fixture(scope="module")
def clip():
    return make_clip(seed=3, frames=7, size=192)


def waves(shift: float, height: int = 96, width: int = 160, seed: int = 0) -> np.ndarray:
    """A smooth image moved left by `shift` pixels exactly (sums of sines), u8[H,W,3]."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(width) + shift, np.arange(height))
    total = np.zeros((height, width))
    for _ in range(60):
        fx, fy = rng.uniform(-1, 1, 2)
        total += np.sin(fx * x + fy * y + rng.uniform(0, 6.28))
    return np.repeat(np.clip(128 + 12 * total, 0, 255).round().astype(np.uint8)[..., None], 3, 2)


def far_errors() -> np.ndarray:
    """Median disparity error at small fractional disparities, where a pixel's tenth is 5 % of depth."""
    errors = []
    for true in (1.4, 1.7, 2.15, 2.4, 2.65, 3.3):
        found, valid, _ = match_pair(waves(0), waves(true), 16)
        assert valid.mean() > 0.8
        errors.append(np.median(found[valid]) - true)
    return np.array(errors)


def test_no_pixel_locking_far_away(monkeypatch):
    refined = np.abs(far_errors())
    assert refined.max() < 0.02
    monkeypatch.setattr(disparity_module, "_REFINE_STEPS", 0)
    assert np.abs(far_errors()).max() > 2 * refined.max()  # what the refinement is for


def test_left_border_is_matched_as_far_as_the_right_view_reaches():
    found, valid, _ = match_pair(waves(0), waves(6.5), 48)
    assert valid[:, 12:40].mean() > 0.9  # columns plain SGBM leaves empty (below 48)
    assert not valid[:, :6].any()  # not in the right view at all
    assert (found[~valid] == 0).all()


def test_occluded_and_untextured_pixels_are_invalid():
    left, right = waves(0, 96, 200, seed=1), waves(4, 96, 200, seed=1)
    square = waves(0, 96, 200, seed=2)
    left[30:70, 90:130] = square[30:70, 90:130]
    right[30:70, 76:116] = square[30:70, 90:130]  # disparity 14 before 4: columns 80..89 are hidden in the right view
    found, valid, _ = match_pair(left, right, 32)
    assert valid[36:64, 81:87].mean() < 0.2
    assert abs(np.median(found[36:64, 96:124]) - 14) < 0.05 and abs(np.median(found[36:64, 150:190]) - 4) < 0.05
    left[:, :], right[:, :] = 90, 90
    assert not match_pair(left, right, 32)[1].any()


def test_exposure_may_differ_between_the_eyes():
    darker = (waves(5.3).astype(float) * 0.85 + 6).round().astype(np.uint8)
    found, valid, _ = match_pair(waves(0), darker, 24)
    assert valid.mean() > 0.7 and abs(np.median(found[valid]) - 5.3) < 0.05


def photograph(shift: float, seed: int) -> np.ndarray:
    """Waves with sensor noise, of little contrast in a third of the rows, u8[H,W,3]."""
    values = waves(shift)[..., 0].astype(float)
    values[40:72] = 128 + (values[40:72] - 128) / 40
    noisy = values + np.random.default_rng(seed).normal(0, 0.4, values.shape)
    return np.repeat(np.clip(noisy, 0, 255).round().astype(np.uint8)[..., None], 3, 2)


def test_weak_texture_with_noise_keeps_its_pixels():
    found, valid, _ = match_pair(photograph(0, 1), photograph(5.75, 2), 24)
    inner = np.s_[44:68, 12:]
    error = np.abs(found - 5.75)[inner][valid[inner]]
    assert valid[inner].mean() > 0.8 and np.median(error) < 0.4


def test_refinement_does_not_believe_a_window_it_cannot_explain(monkeypatch):
    """Reflections differ between the eyes: what the right view shows besides must not pull the disparity."""
    rng = np.random.default_rng(0)
    veil = cv2.GaussianBlur(rng.normal(0, 90, (96, 160)).astype(np.float32), (0, 0), 3)
    right = np.clip(waves(5.5).astype(np.float32) + veil[..., None], 0, 255).round().astype(np.uint8)

    def error() -> float:
        found, valid, _ = match_pair(waves(0), right, 24)
        assert valid.mean() > 0.5
        return float(np.median(np.abs(found[valid] - 5.5)))

    with_weights = error()
    monkeypatch.setattr(disparity_module, "_SGBM_ERROR", 1e3)  # believes all
    assert with_weights < 0.95 * error()


def test_depth_of_a_rendered_room(clip):
    found, valid, _ = match_pair(clip.left[0], clip.right[0], 40)
    depth = depth_from_disparity(found, valid, clip.intrinsics[0, 0], clip.baseline)
    error = np.abs(depth / clip.depth[0] - 1)
    assert valid.mean() > 0.85
    assert np.nanmedian(error) < 0.01 and np.nanpercentile(error, 90) < 0.05


def test_depth_formula_and_range():
    found = np.array([[2.0, 0.0, 10.0, 0.5, 1000.0]], np.float32)
    depth = depth_from_disparity(found, np.array([[True, True, False, True, True]]), 400.0, 0.06)
    np.testing.assert_allclose(depth[0, 0], 400 * 0.06 / 2, rtol=1e-6)
    assert np.isnan(depth[0, 1:]).all() and depth.dtype == np.float32  # none, invalid, 48 m, 2.4 cm
    with pytest.raises(StereoError, match="baseline"):
        depth_from_disparity(found, found > 0, 400.0, 0.0)


@pytest.mark.parametrize("layout", ["left_right", "right_left", "top_bottom", "bottom_top"])
def test_split_side_by_side(layout):
    left, right = np.zeros((2, 4, 6, 3), np.uint8), np.full((2, 4, 6, 3), 9, np.uint8)
    order = [left, right] if layout in ("left_right", "top_bottom") else [right, left]
    first, second = split_side_by_side(np.concatenate(order, 2 if "left" in layout else 1), layout)
    np.testing.assert_array_equal(first, left)
    np.testing.assert_array_equal(second, right)


@pytest.mark.parametrize("times", [1, 2])
def test_the_benchmark_reads_photographs(tmp_path, times):
    """A scene folder in Middlebury's form; larger ones are reduced, and their disparities with them."""
    width = 900 if times == 2 else 160
    truth = np.tile(np.arange(1, 97, dtype=np.float32)[:, None], (1, width))
    truth[0, 0] = np.inf
    for name in ("im0.png", "im1.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((96, width, 3), np.uint8))
    pixels = truth[::-1].astype(">f4" if times == 2 else "<f4").tobytes()  # bottom row first
    sign = b"1.0" if times == 2 else b"-1.0"
    (tmp_path / "disp0.pfm").write_bytes(b"Pf\n%d 96\n%s\n" % (width, sign) + pixels)
    (tmp_path / "calib.txt").write_text("cam0=[1 0 0]\nndisp=64\n")
    left, _, found, largest = photo_scene(tmp_path)
    assert left.shape == (96 // times, width // times, 3) and largest == 64 // times
    np.testing.assert_array_equal(found[1:, 5], truth[times // 2 :: times, 5][1:] / times)
    assert np.isnan(found[0, 0]) == (times == 1)
    (tmp_path / "disp0.pfm").write_bytes(b"Pf\n%d 96\n-1\n" % width)
    with pytest.raises(ValueError, match="has 0 bytes of pixels"):
        photo_scene(tmp_path)


def test_bad_pairs_are_refused():
    image = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(StereoError, match="rectified to one size"):
        match_pair(image, image[:, :20], 8)
    with pytest.raises(StereoError, match="max_disparity 30"):
        match_pair(image, image, 30)
    with pytest.raises(StereoError, match="u8"):
        match_pair(image.astype(float), image, 8)
    with pytest.raises(StereoError, match="odd|halve"):
        split_side_by_side(np.zeros((1, 4, 5, 3), np.uint8))


def reconstruct(clip, **changes):
    arguments = {
        "clip_id": "clip",
        "source_id": "video",
        "timestamps": np.arange(len(clip.left)) / 10,
        "intrinsics": intrinsics_of(clip.left.shape[1:3], 60.0),
        "baseline": clip.baseline,
        "masks": {"ball": clip.masks},
        "captions": {"ball": Caption("the painted ball", "ball")},
        "max_disparity": 40,
        "provenance": {"video": "a.mp4"},
    }
    return reconstruct_clip(clip.left, clip.right, **{**arguments, **changes})


def test_whole_stage_from_stereo_frames_alone(clip):
    result = reconstruct(clip)
    scene = result.scene
    path = np.linalg.norm(np.diff(centers(clip.world_to_camera), axis=0), axis=1).sum()
    assert np.linalg.norm(scene.camera_centers - centers(clip.world_to_camera), axis=1).max() < 0.02 * path
    ball = scene.object("ball")
    both = np.isfinite(ball.points[0, :, 0]) & np.isfinite(ball.points[-1, :, 0])
    assert both.sum() >= 10
    moved = ball.points[-1, both].mean(0) - ball.points[0, both].mean(0)
    assert np.linalg.norm(moved - (clip.ball_centers[-1] - clip.ball_centers[0])) < 0.03
    on_surface = np.linalg.norm(ball.points - clip.ball_centers[:, None], axis=2)
    assert abs(np.nanmedian(on_surface) - 0.35) < 0.02
    assert scene.scale == "metric" and scene.provenance["video"] == "a.mp4" and ball.description == "the painted ball"
    assert scene.provenance["quality"] == json.loads(json.dumps(result.quality.as_dict()))
    assert abs(result.quality.path_length - path) < 0.02 * path


def centers(world_to_camera):
    return -np.einsum("tji,tj->ti", world_to_camera[:, :, :3], world_to_camera[:, :, 3])


def test_only_used_frames_and_keyframes_get_a_depth(clip):
    every, some = reconstruct(clip), reconstruct(clip, used=[1, 3, 6])
    known = np.isfinite(some.depths).any((1, 2))
    assert known.tolist() == [True, True, False, True, False, False, True]  # the path starts at frame 0
    np.testing.assert_array_equal(some.depths[3], every.depths[3])
    np.testing.assert_allclose(some.scene.camera_centers, every.scene.camera_centers, atol=2e-3)
    ball = some.scene.object("ball").points
    assert np.isfinite(ball[[1, 3, 6], :, 0]).any(1).all() and not np.isfinite(ball[[2, 4, 5], :, 0]).any()


def test_depth_limit_is_the_callers(clip):
    near = reconstruct(clip, max_depth=3.5)
    assert np.nanmax(near.depths) <= 3.5 < np.nanmax(reconstruct(clip).depths)
    assert near.scene.provenance["parameters"]["max_depth"] == 3.5


def test_unknown_baseline_is_flagged_and_scales_the_world(clip):
    short = dataclasses.replace(clip, left=clip.left[:3], right=clip.right[:3], masks=clip.masks[:3])
    known, assumed = (reconstruct(short, baseline=b).scene for b in (clip.baseline, None))
    assert assumed.scale == "assumed_baseline"
    ratio = np.linalg.norm(assumed.camera_centers[-1]) / np.linalg.norm(known.camera_centers[-1])
    assert abs(ratio - 0.063 / clip.baseline) < 0.02


def test_bad_clips_are_rejected_with_reasons(clip):
    shifted = np.roll(clip.right[:2], 3, axis=1)  # rows do not match: not rectified
    with pytest.raises(StereoError) as caught:
        few = dataclasses.replace(clip, left=clip.left[:2], right=shifted, masks=clip.masks[:2])
        reconstruct(few)
    assert caught.value.reason == "low_quality" and "vertical_error" in str(caught.value)
    with pytest.raises(StereoError):  # eyes swapped: no positive disparity fits
        reconstruct(dataclasses.replace(clip, left=clip.right, right=clip.left))
    with pytest.raises(StereoError, match="intrinsics"):
        reconstruct(clip, intrinsics=clip.intrinsics[:2])
    with pytest.raises(StereoError, match="timestamps"):
        reconstruct(clip, timestamps=np.arange(3.0))
    with pytest.raises(StereoError, match="'ball'"):
        reconstruct(clip, masks={"ball": clip.masks[:, :5]})


def test_objects_without_points_are_named(clip):
    short = dataclasses.replace(clip, left=clip.left[:2], right=clip.right[:2])
    scene = reconstruct(short, masks={"ghost": np.zeros_like(clip.masks[:2])}).scene
    assert scene.objects == () and "0 points" in scene.provenance["objects_left_out"]["ghost"]


def test_quality_limits_name_every_broken_figure():
    good = Quality(0.9, 0.1, 6.0, 0.1, 0.3, 0.9, 0.01, 1.0, 2, "metric", 0.0)
    require_quality(good.as_dict(), QualityLimits(), "c")
    bad = dataclasses.replace(good, valid_disparity=0.1, static_drift=float("nan"), inlier_ratio=0.2)
    with pytest.raises(StereoError, match="clip c: ") as caught:
        require_quality(bad.as_dict(), QualityLimits(), "c")
    broken = str(caught.value)
    assert "valid_disparity 0.1 is below 0.3" in broken and "inlier_ratio" in broken
    assert "static_drift could not be measured" in broken and broken.count(";") == 2
    assert bad.as_dict()["static_drift"] is None
    require_quality(bad.as_dict(), QualityLimits(*[None] * len(dataclasses.fields(QualityLimits))), "c")
