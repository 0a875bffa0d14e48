"""Tracks and the image-point helpers against exact geometry."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.stereo import tracks as tracks_module
from data_prep.stereo.disparity import StereoError
from data_prep.stereo.features import (
    backproject,
    clear_of_edges,
    follow_points,
    grey_frames,
    patches,
    project,
    sample_depth,
    seed_points,
)
from data_prep.stereo.quality import static_drift, vertical_error
from data_prep.stereo.tracks import reject_outliers, track_points
from data_prep.stereo.trajectory import solve_trajectory
from tests.data_prep.stereo.stereo_world import make_clip


@pytest.fixture(scope="module")
def clip():
    return make_clip(seed=7, frames=8, size=192)


@pytest.fixture(scope="module")
def tracks(clip):
    depth = clip.depth.astype(np.float32)
    return track_points(clip.left, depth, clip.intrinsics, clip.world_to_camera, [clip.masks], seed_every=3)


def test_background_points_stay_in_the_world(clip, tracks):
    world = tracks.world[tracks.labels == -1]
    assert len(world) >= 200
    spread = np.nanmax(np.linalg.norm(world - np.nanmedian(world, axis=1, keepdims=True), axis=2), axis=1)
    assert np.median(spread) < 0.02 and np.percentile(spread, 95) < 0.1


def test_object_points_move_with_the_object(clip, tracks):
    points = tracks.of(0)
    assert points.shape[0] == 8 and points.shape[1] >= 30
    radius = np.linalg.norm(points - clip.ball_centers[:, None], axis=2)
    assert abs(np.nanmedian(radius) - 0.35) < 0.01 and np.nanpercentile(radius, 95) < 0.45
    both = np.isfinite(points[0, :, 0]) & np.isfinite(points[-1, :, 0])
    assert both.sum() >= 10
    moved = points[-1, both] - points[0, both]
    assert np.linalg.norm(np.median(moved, axis=0) - (clip.ball_centers[-1] - clip.ball_centers[0])) < 0.02


def test_points_run_backward_from_their_seeds_too(tracks):
    seen = np.isfinite(tracks.world[..., 0])
    assert (seen[:, 0] & seen[:, -1]).sum() >= 100
    assert seen.sum(1).min() >= 2
    assert (np.isfinite(tracks.image[..., 0]) | ~seen).all()  # a world point has an image point


def test_points_lie_where_they_are_seen(clip, tracks):
    """Projecting a world point gives its image point back, frame by frame."""
    for frame in (0, 5):
        seen = np.isfinite(tracks.world[:, frame, 0])
        image, _ = project(tracks.world[seen, frame], clip.world_to_camera[frame], clip.intrinsics)
        np.testing.assert_allclose(image, tracks.image[seen, frame], atol=1e-4)


def test_hidden_object_is_unseen_then_found_again(clip):
    masks = clip.masks.copy()
    masks[4] = False  # the segmenter missed a frame
    depth = clip.depth.astype(np.float32)
    found = track_points(clip.left, depth, clip.intrinsics, clip.world_to_camera, [masks], seed_every=8)
    seen = np.isfinite(found.of(0)[..., 0])
    assert not seen[4].any() and (seen[3] & seen[5]).sum() >= 10


def test_depth_jumps_end_a_track(clip):
    depth = clip.depth.astype(np.float32)
    depth[4:] *= 1.5
    found = track_points(clip.left, depth, clip.intrinsics, clip.world_to_camera, seed_every=8)
    seen = np.isfinite(found.world[..., 0])
    assert not (seen[:, 3] & seen[:, 4]).any()


def test_bad_shapes_are_refused(clip):
    depth = clip.depth.astype(np.float32)
    with pytest.raises(StereoError, match="depths must be"):
        track_points(clip.left, depth[1:], clip.intrinsics, clip.world_to_camera)
    with pytest.raises(StereoError, match=r"object_masks\[0\]"):
        track_points(clip.left, depth, clip.intrinsics, clip.world_to_camera, [clip.masks[:3]])


def test_reject_outliers():
    rng = np.random.default_rng(0)
    points = rng.normal(scale=0.1, size=(2, 40, 3)) + [1, 2, 3]
    points[1, 5] += 3.0
    points[0, 7] = np.nan
    kept = reject_outliers(points)
    assert np.isnan(kept[1, 5]).all() and np.isnan(kept[0, 7]).all()
    assert np.isfinite(kept[..., 0]).sum() >= 76 and np.isfinite(points[1, 5]).all()  # the input stays


def test_depth_is_sampled_exactly_on_a_plane():
    """1/z of a plane is linear in the image, so bilinear sampling of it has no error."""
    row, column = np.mgrid[0:40, 0:50].astype(np.float64)
    depth = 1 / (0.2 + 0.002 * column - 0.001 * row)
    points = np.random.default_rng(0).uniform(0, 38, (50, 2)).astype(np.float32)
    true = 1 / (0.2 + 0.002 * points[:, 0].astype(np.float64) - 0.001 * points[:, 1])
    np.testing.assert_allclose(sample_depth(depth, points), true, rtol=1e-7)
    depth[10, 10] = np.nan
    assert np.isnan(sample_depth(depth, np.array([[9.5, 9.5]], np.float32))[0])


def test_projection_round_trip():
    rng = np.random.default_rng(3)
    pose = make_clip(seed=1, frames=3, size=16).world_to_camera[2]
    intrinsics = np.array([[300.0, 0, 128], [0, 310, 120], [0, 0, 1]])
    points = rng.uniform(0, 255, (30, 2))
    world = backproject(points, rng.uniform(1, 9, 30), intrinsics, pose)
    image, depth = project(world, pose, intrinsics)
    np.testing.assert_allclose(image, points, atol=1e-9)
    assert (depth > 0.9).all()
    still = np.eye(4)[:3]
    centre = backproject(np.array([[127.5, 119.5]]), np.array([2.0]), intrinsics, still)  # 127.5 is pixel position 128
    np.testing.assert_allclose(centre, [[0, 0, 2]], atol=1e-12)


def test_edges_are_cleared():
    depth = np.full((30, 30), 2.0, np.float32)
    depth[:, 15:] = 4.0
    cleared = clear_of_edges(depth)
    assert (
        np.isnan(cleared[:, 12:18]).all() and np.isfinite(cleared[:, :11]).all() and np.isfinite(cleared[:, 19:]).all()
    )


def test_seeds_spread_and_keep_away_from_taken(clip):
    grey = grey_frames(clip.left[:1])[0]
    allowed = np.ones(grey.shape, bool)
    allowed[:, :40] = False
    first = seed_points(grey, allowed, 100)
    assert 60 <= len(first) <= 100 and (first[:, 0] >= 39).all()
    cells = set(map(tuple, (first // 48).astype(int)))
    assert len(cells) >= 12  # of 16 (the first column is forbidden)
    more = seed_points(grey, allowed, 100, taken=first)
    assert np.linalg.norm(first[:, None] - more[None], axis=2).min() > 3


def test_following_checks_the_way_back(clip):
    grey = grey_frames(clip.left[:2])
    points = seed_points(grey[0], np.ones(grey[0].shape, bool), 80)
    _, good = follow_points(grey[0], grey[1], points)
    assert good.mean() > 0.8
    noise = np.random.default_rng(0).integers(0, 255, grey[0].shape, np.uint8)
    _, good = follow_points(grey[0], noise, points)
    assert good.mean() < 0.1
    assert follow_points(grey[0], grey[1], points[:0])[1].shape == (0,)


def test_stripes_get_no_seeds():
    """A point on a stripe slides along it unnoticed, so none may be followed there."""
    rng = np.random.default_rng(0)
    stripes = np.repeat(rng.integers(40, 210, (120, 1)), 120, axis=1) + rng.integers(0, 3, (120, 120))
    checks = np.kron(rng.integers(40, 210, (20, 20)), np.ones((6, 6), int))
    everywhere = np.ones((120, 120), bool)
    assert len(seed_points(stripes.astype(np.uint8), everywhere, 60)) == 0
    assert len(seed_points(checks.astype(np.uint8), everywhere, 60)) > 40


def test_patches_measure_likeness(clip):
    grey = grey_frames(clip.left[:1])[0]
    points = np.random.default_rng(0).uniform(20, 170, (40, 2)).astype(np.float32)
    here = patches(grey, points)
    np.testing.assert_allclose((here**2).sum(1), 1, rtol=1e-4)
    darker = (grey * 0.7 + 10).round().astype(np.uint8)
    assert (here * patches(darker, points)).sum(1).min() > 0.99
    whole = np.rint(points)
    by_hand = grey[int(whole[0, 1]) - 6 : int(whole[0, 1]) + 7, int(whole[0, 0]) - 6 : int(whole[0, 0]) + 7].astype(
        float
    )
    by_hand = (by_hand - by_hand.mean()).ravel()
    np.testing.assert_allclose(patches(grey, whole)[0], by_hand / np.linalg.norm(by_hand), atol=1e-5)


def test_a_point_ends_where_its_look_changes(clip, monkeypatch):
    """Frames fade slowly into another picture: every step is small, the sum is another surface."""
    first, other = clip.left[0].astype(float), clip.left[0][::-1].astype(float)
    frames = np.stack([(1 - a) * first + a * other for a in np.linspace(0, 1, 9)]).round().astype(np.uint8)
    depth = np.full(frames.shape[:3], 3.0, np.float32)
    poses = np.repeat(np.eye(4)[None, :3], 9, axis=0)
    greys = grey_frames(frames)

    def survivors():
        """Likeness of the points that reach the end."""
        found = track_points(frames, depth, clip.intrinsics, poses, seed_every=20)
        image = found.image[np.isfinite(found.world[:, 8, 0])]
        return (patches(greys[0], image[:, 0]) * patches(greys[8], image[:, 8])).sum(1)

    checked = survivors()
    monkeypatch.setattr(tracks_module, "_MIN_LIKENESS", -1.0)
    unchecked = survivors()
    assert checked.min() >= 0.6 and (unchecked < 0.6).sum() > 20
    assert len(checked) < 0.8 * len(unchecked)


def test_quality_figures(clip):
    depth = clip.depth.astype(np.float32)
    path = solve_trajectory(clip.left, depth, clip.intrinsics, clip.masks)
    found = track_points(clip.left, depth, clip.intrinsics, path.world_to_camera, [clip.masks])
    assert static_drift(found, path) < 0.01
    wrong = track_points(clip.left, depth, clip.intrinsics, np.repeat(path.world_to_camera[:1], 8, 0), [clip.masks])
    assert static_drift(wrong, path) > 0.02
    disparity = (clip.intrinsics[0, 0] * clip.baseline / clip.depth[0]).astype(np.float32)
    valid = np.ones(disparity.shape, bool)
    assert vertical_error(clip.left[0], clip.right[0], disparity, valid) < 0.05
    assert abs(vertical_error(clip.left[0], np.roll(clip.right[0], 2, axis=0), disparity, valid) - 2) < 0.1
