"""Poses by points: against exact positions, and slopes against central differences."""

import cv2
import numpy as np
import pytest

from data_prep.stereo.pose import _Seen, fit_pose, refine_pose

INTRINSICS = np.array([[400.0, 0, 250], [0, 390, 240], [0, 0, 1]])
POSE = np.column_stack([cv2.Rodrigues(np.array([0.02, -0.1, 0.03]))[0], [0.2, -0.1, 0.3]])


def seen(world):
    camera = world @ POSE[:, :3].T + POSE[:, 3]
    return (camera @ INTRINSICS.T)[:, :2] / camera[:, 2:] - 0.5


def test_refinement_recovers_an_exact_pose_despite_outliers():
    rng = np.random.default_rng(1)
    world = rng.uniform([-2, -2, 2], [2, 2, 7], (300, 3))
    points = seen(world)
    points[:60] += rng.uniform(1.0, 6.0, (60, 2))  # a moving object
    start = POSE + np.column_stack([np.zeros((3, 3)), [0.02, 0.01, -0.03]])
    found, inlier, rms = refine_pose(world, points, INTRINSICS, start)
    np.testing.assert_allclose(found, POSE, atol=1e-7)
    assert inlier[60:].all() and rms < 1.0
    assert refine_pose(world, points + rng.uniform(-80, 80, points.shape), INTRINSICS, start) is None


def test_two_in_five_points_may_be_wrong():
    rng = np.random.default_rng(2)
    world = rng.uniform([-2, -2, 2], [2, 2, 7], (200, 3))
    points = seen(world)
    points[:80] += rng.uniform(20, 60, (80, 2))
    found, inlier, rms = fit_pose(world, points.astype(np.float32), INTRINSICS, np.eye(4)[:3])
    np.testing.assert_allclose(found, POSE, atol=1e-5)  # float32 points
    assert inlier[80:].all() and not inlier[:80].any() and rms < 1e-3
    assert fit_pose(world[:20], points[:20], INTRINSICS, np.eye(4)[:3]) is None


@pytest.mark.parametrize("turn", [0.0, 1e-6, 1e-3, 0.3, 2.0])
def test_slopes_are_those_of_central_differences(turn):
    rng = np.random.default_rng(3)
    camera, towards = rng.uniform([-1, -1, 5], [1, 1, 9], (20, 3)), rng.normal(size=6)
    step = np.concatenate([turn * towards[:3] / np.linalg.norm(towards[:3]), [0.3, -0.2, 12.0]])
    view = _Seen(camera, rng.uniform(0, 400, (20, 2)), INTRINSICS)
    sides = [[view.residuals(step + sign * 1e-5 * axis) for sign in (1, -1)] for axis in np.eye(6)]
    expected = np.stack([(above - below) / 2e-5 for above, below in sides], 1)
    np.testing.assert_allclose(view.slopes(step), expected, rtol=1e-7, atol=1e-5)
