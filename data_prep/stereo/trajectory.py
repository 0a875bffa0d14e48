"""The camera's path from frames and depths: points of keyframes followed, and a pose for every frame."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from data_prep.scenes.scene import invert_poses
from data_prep.stereo.disparity import StereoError, check_array
from data_prep.stereo.features import (
    backproject,
    clear_of_edges,
    follow_points,
    grey_frames,
    match_features,
    project,
    sample_depth,
    sample_mask,
    seed_points,
)
from data_prep.stereo.pose import MIN_INLIERS, fit_pose

_SEEDS = 700  # points per keyframe
_KEEP_RATIO = 0.6  # a new keyframe when fewer of the keyframe's points survive
_FAR_OFF = 7.0  # pixels (half a tracking window) between where points were looked for and where the pose puts them
_WELL_FOLLOWED = 0.5  # of the keyframe's living points; where fewer agree with a pose, features are asked too
_MASK_MARGIN = 9  # pixels kept clear around moving objects: half a tracking window


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """The camera's path and how well it is founded.

    Attributes:
      world_to_camera: f64[T,3,4]; frame 0 is the identity.
      keyframes: frame numbers whose points and depths carry the poses after them.
      inlier_ratio: f64[T] share of the followed points that agree with the pose; 1 in frame 0.
      reprojection_rms: f64[T] pixels over those points; 0 in frame 0.
    """

    world_to_camera: np.ndarray
    keyframes: tuple[int, ...]
    inlier_ratio: np.ndarray
    reprojection_rms: np.ndarray

    @property
    def camera_centers(self) -> np.ndarray:
        """Return f64[T,3] world, metres."""
        return invert_poses(self.world_to_camera)[:, :, 3]

    @property
    def path_length(self) -> float:
        """Return the metres along the camera centres."""
        return float(np.linalg.norm(np.diff(self.camera_centers, axis=0), axis=1).sum())


@dataclasses.dataclass(eq=False)
class _Keyframe:
    """Points of one frame with known world positions, and where they are in the current frame."""

    frame: int
    points: np.ndarray  # f32[N,2] in the keyframe
    world: np.ndarray  # f64[N,3]
    depth: np.ndarray  # f32[H,W] metres, NaN where unknown or beside a step
    pose: np.ndarray  # f64[3,4] world->camera
    current: np.ndarray  # f32[N,2] in the frame last followed to
    alive: np.ndarray  # bool[N]

    def accept(self, fit: _Fit) -> None:
        """Go on from the points that agree with a frame's pose."""
        self.alive[:] = False
        self.alive[fit.points] = True
        self.current[fit.points] = fit.image


@dataclasses.dataclass(frozen=True, eq=False)
class _Fit:
    """A frame's pose f64[3,4], what it rests on, and the keyframe's points that were followed into it and agree."""

    pose: np.ndarray
    support: int  # points or features that agree
    ratio: float  # their share
    rms: float  # pixels
    points: np.ndarray  # int[M]; none where the pose is one of features
    image: np.ndarray  # f32[M,2] where they are now


def solve_trajectory(
    frames: np.ndarray, depths: np.ndarray, intrinsics: np.ndarray, masks: np.ndarray | None = None
) -> Trajectory:
    """Find the camera's path by points of keyframes followed through the frames after them; frame 0 is the world.

    Points are spread over a keyframe, placed in the world by its depth and pose, followed from frame to frame
    (Lucas-Kanade, forward-backward) and each time matched against the keyframe itself, so that drift does not add up
    frame by frame. They are looked for where the camera's last motion, going on, puts them; where few are found, where
    they would be without motion, and then where features matched over any distance put the camera. The pose is PnP
    inside RANSAC, then least squares with Tukey's weights. Points that disagree (moving objects) are dropped. A new
    keyframe starts where too few points are left. Deterministic.

    Args:
      frames: u8[T,H,W,3].
      depths: f32[T,H,W] metres, NaN = unknown; asked for at keyframes only.
      intrinsics: f64[3,3] pixels, pixel centres at +0.5.
      masks: bool[T,H,W], True on objects that may move; None = the static scene must fill most of the view.

    Raises:
      StereoError: shapes do not fit ("bad_input"), or a frame's pose cannot be found ("pose_failed", with its number).
        No pose is ever interpolated.
    """
    check_array("frames", frames, np.uint8, (None, None, None, 3))
    check_array("depths (one depth map per frame)", depths, None, frames.shape[:3])
    check_array("intrinsics (one camera for the clip)", intrinsics, np.float64, (3, 3))
    if masks is not None:
        check_array("masks", masks, bool, frames.shape[:3])
    count, greys = len(frames), grey_frames(frames)
    poses = np.zeros((count, 3, 4))
    poses[0, :, :3] = np.eye(3)
    ratios, errors = np.ones(count), np.zeros(count)

    def keyframe(frame: int) -> _Keyframe:
        return _make_keyframe(frame, greys[frame], depths[frame], intrinsics, _still(masks, frame), poses[frame])

    key = keyframe(0)
    keyframes = [0]
    for frame in range(1, count):
        still = _still(masks, frame)
        fit = _track(key, greys, frame, intrinsics, poses, still)
        if fit is None and key.frame != frame - 1:
            key = keyframe(frame - 1)
            keyframes.append(frame - 1)
            fit = _track(key, greys, frame, intrinsics, poses, still)
        if fit is None:
            raise StereoError(
                f"no camera pose: too few of {len(key.points)} points from frame {key.frame} agree on one. Cut the "
                "clip before this frame, or check its exposure, texture and the masks of moving objects",
                "pose_failed",
                frame,
            )
        key.accept(fit)
        poses[frame], ratios[frame], errors[frame] = fit.pose, fit.ratio, fit.rms
        if key.alive.sum() < _KEEP_RATIO * len(key.points) and frame < count - 1:
            key = keyframe(frame)
            keyframes.append(frame)
    return Trajectory(poses, tuple(keyframes), ratios, errors)


def _still(masks: np.ndarray | None, frame: int) -> np.ndarray | None:
    """bool[H,W]: clear of moving objects and a margin around them."""
    if masks is None:
        return None
    return cv2.dilate(masks[frame].astype(np.uint8), np.ones((2 * _MASK_MARGIN + 1,) * 2, np.uint8)) == 0


def _make_keyframe(
    frame: int, grey: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray, still: np.ndarray | None, pose: np.ndarray
) -> _Keyframe:
    depth = clear_of_edges(depth)
    allowed = np.isfinite(depth) if still is None else np.isfinite(depth) & still
    points = seed_points(grey, allowed, _SEEDS)
    distance = sample_depth(depth, points)
    points, distance = points[np.isfinite(distance)], distance[np.isfinite(distance)]
    if len(points) < MIN_INLIERS:
        raise StereoError(
            f"only {len(points)} trackable points with depth outside the masks, {MIN_INLIERS} are needed: too little "
            "texture, too little valid depth, or moving objects fill the view",
            "pose_failed",
            frame,
        )
    world = backproject(points, distance, intrinsics, pose)
    return _Keyframe(frame, points, world, depth, pose.copy(), points.copy(), np.ones(len(points), bool))


def _track(
    key: _Keyframe, greys: np.ndarray, frame: int, intrinsics: np.ndarray, poses: np.ndarray, still: np.ndarray | None
) -> _Fit | None:
    """Follows the keyframe's points into `frame`; None where no pose fits."""
    starts = [poses[frame - 1]]
    if frame > 1:
        starts.insert(0, _going_on(poses[frame - 2], poses[frame - 1]))
    best = None
    for start in starts:
        best = _better(best, _follow(key, greys, frame, intrinsics, start, still))
        if best is not None and best.support >= _WELL_FOLLOWED * key.alive.sum():
            return best
    if key.frame != frame - 1:  # a new keyframe comes first
        return best
    features = _fit_features(key, greys[key.frame], greys[frame], intrinsics, still)
    if features is None:
        return best
    return _better(_better(best, features), _follow(key, greys, frame, intrinsics, features.pose, still))


def _going_on(before: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The pose f64[3,4] after `last` if the motion from `before` goes on, in the camera's own axes."""
    turn = last[:, :3] @ before[:, :3].T
    return np.column_stack([turn @ last[:, :3], turn @ (last[:, 3] - before[:, 3]) + last[:, 3]])


def _better(first: _Fit | None, second: _Fit | None) -> _Fit | None:
    if first is None or second is None:
        return first or second
    return second if second.support > first.support else first


def _fit_features(
    key: _Keyframe, first: np.ndarray, second: np.ndarray, intrinsics: np.ndarray, still: np.ndarray | None
) -> _Fit | None:
    """Pose of the view `second` by features of the keyframe's view `first` that have depth; None if too few agree."""
    allowed = np.ones(second.shape, bool) if still is None else still
    points, there = match_features(first, second, np.isfinite(key.depth), allowed)
    distance = sample_depth(key.depth, points)
    known = np.isfinite(distance)
    world = backproject(points[known], distance[known], intrinsics, key.pose)
    found = fit_pose(world, there[known], intrinsics, key.pose)
    if found is None:
        return None
    pose, inlier, rms = found
    return _Fit(pose, int(inlier.sum()), float(inlier.mean()), rms, np.zeros(0, int), np.zeros((0, 2), np.float32))


def _follow(
    key: _Keyframe,
    greys: np.ndarray,
    frame: int,
    intrinsics: np.ndarray,
    start: np.ndarray,
    still: np.ndarray | None,
) -> _Fit | None:
    """Follows the keyframe's points into `frame` from where the pose `start` f64[3,4] puts them; None if none fits.

    Where the pose found puts them farther off than that reaches, they are followed once more from it: the first round
    may have found only those that happened to move little.
    """
    fit = _follow_once(key, greys, frame, intrinsics, start, still)
    if fit is None:
        return None
    world = key.world[key.alive]
    off = np.linalg.norm(project(world, fit.pose, intrinsics)[0] - project(world, start, intrinsics)[0], axis=1)
    if not np.percentile(off, 90) > _FAR_OFF:
        return fit
    return _better(fit, _follow_once(key, greys, frame, intrinsics, fit.pose, still))


def _follow_once(
    key: _Keyframe,
    greys: np.ndarray,
    frame: int,
    intrinsics: np.ndarray,
    start: np.ndarray,
    still: np.ndarray | None,
) -> _Fit | None:
    alive = np.flatnonzero(key.alive)
    guess, depth = project(key.world[alive], start, intrinsics)
    alive, guess = alive[depth > 0], guess[depth > 0]
    moved, good = follow_points(greys[frame - 1], greys[frame], key.current[alive], guess)
    if key.frame < frame - 1:
        direct, sure = follow_points(greys[key.frame], greys[frame], key.points[alive], guess)
        sure &= np.linalg.norm(direct - moved, axis=1) < 2
        moved = np.where((sure & good)[:, None], direct, moved)
    if still is not None:
        good &= sample_mask(still, moved)
    alive, moved = alive[good], moved[good]
    fit = fit_pose(key.world[alive], moved, intrinsics, start)
    if fit is None:
        return None
    pose, inlier, rms = fit
    return _Fit(pose, int(inlier.sum()), float(inlier.mean()), rms, alive[inlier], moved[inlier])
