"""Camera poses against a rendered clip's exact ones, with exact depth: what is left is the tracker's own error."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from data_prep.stereo import trajectory as trajectory_module
from data_prep.stereo.disparity import StereoError
from data_prep.stereo.trajectory import solve_trajectory
from tests.data_prep.stereo.stereo_world import make_clip


@pytest.fixture(scope="module")
def clip():
    return make_clip(seed=5, frames=8, size=224)


def depths(clip):
    return clip.depth.astype(np.float32)


def center_error(poses, clip):
    """Largest distance of camera centres, and the path's length."""
    found, true = (-np.einsum("tji,tj->ti", p[:, :, :3], p[:, :, 3]) for p in (poses, clip.world_to_camera))
    return np.linalg.norm(found - true, axis=1).max(), np.linalg.norm(np.diff(true, axis=0), axis=1).sum()


def turn_error(poses, clip):
    """Largest angle in degrees between rotations."""
    relative = poses[:, :, :3] @ clip.world_to_camera[:, :, :3].swapaxes(1, 2)
    return np.degrees(max(np.linalg.norm(cv2.Rodrigues(r)[0]) for r in relative))


@pytest.mark.parametrize("masked", [True, False])
def test_path_and_turns(clip, masked):
    poses = solve_trajectory(clip.left, depths(clip), clip.intrinsics, clip.masks if masked else None).world_to_camera
    assert poses.shape == (8, 3, 4) and poses.dtype == np.float64
    np.testing.assert_array_equal(poses[0], np.eye(4)[:3])
    np.testing.assert_allclose(
        poses[:, :, :3] @ poses[:, :, :3].swapaxes(1, 2), np.eye(3)[None].repeat(8, 0), atol=1e-9
    )
    error, length = center_error(poses, clip)
    assert error < 0.015 * length and turn_error(poses, clip) < 0.15


def test_figures_tell_how_well_the_pose_is_founded(clip):
    result = solve_trajectory(clip.left, depths(clip), clip.intrinsics, clip.masks)
    assert result.reprojection_rms.max() < 0.6 and result.inlier_ratio.min() > 0.9
    error, length = center_error(result.world_to_camera, clip)
    assert abs(result.path_length - length) < 2 * error + 1e-3
    skewed = clip.intrinsics + [[0, 0, 40], [0, 0, 0], [0, 0, 0]]  # a wrong principal point shows in both figures
    worse = solve_trajectory(clip.left, depths(clip), skewed, clip.masks)
    assert worse.reprojection_rms.max() > result.reprojection_rms.max()
    assert center_error(worse.world_to_camera, clip)[0] > 3 * error


@pytest.mark.parametrize("drive", [(0.6, 0.25), (0.3, 0.32)])
def test_fast_motion_is_followed(drive):
    """Wall points come nearer by a fifth and the view turns by a quarter of itself between frames."""
    fast = make_clip(seed=5, frames=4, size=192, drive=drive)
    poses = solve_trajectory(fast.left, depths(fast), fast.intrinsics).world_to_camera
    error, length = center_error(poses, fast)
    assert error < 0.015 * length and turn_error(poses, fast) < 0.25


def test_a_sudden_stop_is_followed():
    """Where the last motion, going on, leads astray."""
    fast = make_clip(seed=5, frames=3, size=192, drive=(0.5, 0.2))
    stop = np.array([0, 1, 2, 2])
    poses = solve_trajectory(fast.left[stop], depths(fast)[stop], fast.intrinsics).world_to_camera
    np.testing.assert_allclose(poses[3], poses[2], atol=2e-3)


def test_deterministic(clip):
    first, second = (solve_trajectory(clip.left[:4], depths(clip)[:4], clip.intrinsics) for _ in range(2))
    assert first.world_to_camera.tobytes() == second.world_to_camera.tobytes()


def test_new_keyframes_do_not_break_the_path(clip, monkeypatch):
    monkeypatch.setattr(trajectory_module, "_KEEP_RATIO", 1.01)  # every frame becomes one
    result = solve_trajectory(clip.left, depths(clip), clip.intrinsics, clip.masks)
    assert result.keyframes == tuple(range(7))
    error, length = center_error(result.world_to_camera, clip)
    assert error < 0.03 * length


def test_moving_object_in_the_masks_is_ignored(clip):
    """A mask over the static half leaves the other half: the pose must not change much."""
    half = np.zeros_like(clip.masks)
    half[:, :, 130:] = True
    poses = solve_trajectory(clip.left, depths(clip), clip.intrinsics, clip.masks | half).world_to_camera
    error, length = center_error(poses, clip)
    assert error < 0.04 * length


def test_failure_names_the_frame(clip):
    frames = clip.left.copy()
    frames[4] = np.random.default_rng(0).integers(0, 255, frames[4].shape, np.uint8)
    with pytest.raises(StereoError, match="frame 4: no camera pose") as caught:
        solve_trajectory(frames, depths(clip), clip.intrinsics)
    assert caught.value.frame == 4 and caught.value.reason == "pose_failed"
    with pytest.raises(StereoError, match="frame 0: only 0 trackable points") as caught:
        solve_trajectory(clip.left, np.full_like(depths(clip), np.nan), clip.intrinsics)
    assert caught.value.reason == "pose_failed"


def test_bad_input_is_refused(clip):
    with pytest.raises(StereoError, match="one depth map per frame"):
        solve_trajectory(clip.left, depths(clip)[1:], clip.intrinsics)
    with pytest.raises(StereoError, match="intrinsics"):
        solve_trajectory(clip.left, depths(clip), clip.intrinsics[:2])
    with pytest.raises(StereoError, match="masks must be bool"):
        solve_trajectory(clip.left, depths(clip), clip.intrinsics, clip.masks.astype(np.uint8))
    with pytest.raises(StereoError, match="frames must be uint8"):
        solve_trajectory(clip.left.astype(float), depths(clip), clip.intrinsics)


def test_still_camera_stays(clip):
    still = dataclasses.replace(clip, left=clip.left[[0, 0, 0]], depth=clip.depth[[0, 0, 0]])
    poses = solve_trajectory(still.left, depths(still), clip.intrinsics).world_to_camera
    np.testing.assert_allclose(poses, np.eye(4)[None, :3].repeat(3, 0), atol=2e-4)
