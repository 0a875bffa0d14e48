"""What is wrong with two views: rows that do not agree, lenses that are not perspective, eyes that are swapped."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from data_prep.scenes.scene import invert_poses
from data_prep.stereo.disparity import beyond_search, match_pair
from data_prep.stereo.features import follow_points, grey_frames, project, seed_points
from data_prep.stereo.tracks import PointTracks

_MIN_POINTS = 40
_MAX_SLOPE_ERROR = 0.03  # of a row curvature that counts as measured
_MAX_OFFSET_ERROR = 0.035  # pixels; points of one distance tell less, and a slanted wall's bias then looks like one
_MAX_DISAGREEMENT = 0.5  # pixels between the estimates of two pairs of frames
MAX_BEYOND = 0.02  # share of the pixels that may lie beyond the range of the search
_NOISE = 0.1  # pixels: scale of the residuals of followed points


def row_errors(
    left: np.ndarray, right: np.ndarray, disparity: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow points from the left to the right view, where rectified rows are the same.

    Args:
      left, right: u8[H,W,3].
      disparity: f32[H,W] pixels, where to start looking.
      valid: bool[H,W].

    Returns:
      points f32[N,2] array coordinates in `left`; f32[N] rows that they are lower, and f32[N] pixels further left, in
      `right`.
    """
    first, second = grey_frames(np.stack([left, right]))
    start = seed_points(first, valid, 200)
    shift = disparity[np.rint(start[:, 1]).astype(int), np.rint(start[:, 0]).astype(int)]
    found, good = follow_points(first, second, start, guess=start - np.column_stack([shift, np.zeros_like(shift)]))
    return start[good], (found - start)[good, 1], (start - found)[good, 0]


def row_curvature(points: np.ndarray, rows: np.ndarray, disparity: np.ndarray, intrinsics: np.ndarray) -> float:
    """Measure how rows bend with disparity: the k of `rows = k * disparity * x * y`, x and y in focal lengths.

    Perspective views have none whatever is in front of them, and a small turn of one eye bends all rows alike. To first
    order an equidistant fisheye has 2/3 and an equirectangular view 1: dv/du of a point that comes nearer, from
    u = f x (1 - r^2 / 3), v alike.

    Args:
      points, rows, disparity: as `row_errors` gives them.
      intrinsics: f64[3,3] pixels.

    Returns:
      k; NaN where the points do not tell (few, all in the middle, or without disparity).
    """
    if len(points) < _MIN_POINTS:
        return math.nan
    x = (points[:, 0] + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (points[:, 1] + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    terms = np.column_stack([disparity * x * y, np.ones_like(x), x, y, x * y, y * y])  # the others: small rotations
    found = least_squares(lambda k: terms @ k - rows, np.zeros(6), loss="soft_l1", f_scale=_NOISE)
    value, error = float(found.x[0]), _standard_error(found.jac, terms @ found.x - rows, 0)
    return value if error < max(_MAX_SLOPE_ERROR, 0.2 * abs(value)) else math.nan


def disparity_offset(
    tracks: PointTracks, world_to_camera: np.ndarray, intrinsics: np.ndarray, baseline: float
) -> float:
    """Estimate by how many pixels all disparities are too large: the eyes' principal points differ.

    Where the camera goes forward, a still point's image grows as its disparity does; with an offset it does not. The
    motion between two frames and the offset are fitted together to the background's tracks.

    Args:
      tracks: of the whole clip.
      world_to_camera: f64[T,3,4].
      intrinsics: f64[3,3] pixels.
      baseline: metres, as used for the tracks' depths.

    Returns:
      Pixels; NaN where the motion does not tell, as without any forward, or two pairs of frames tell different ones.
    """
    still = tracks.labels == -1
    image, world = tracks.image[still], tracks.world[still]
    count, estimates = len(world_to_camera), []
    for first in sorted({0, count // 4, count // 2}):
        for second in range(count - 1, first, -1):
            both = np.isfinite(world[:, [first, second], 0]).all(1)
            if both.sum() >= _MIN_POINTS:
                poses = world_to_camera[[first, second]]
                pair = _offset_of_pair(
                    image[both][:, [first, second]], world[both][:, [first, second]], poses, intrinsics, baseline
                )
                estimates += [pair] if math.isfinite(pair[1]) else []
                break
    if len(estimates) < 2:
        return math.nan
    value, error = np.array(estimates).T
    if np.ptp(value) > _MAX_DISAGREEMENT:
        return math.nan
    weight = 1 / np.maximum(error, 1e-3) ** 2
    known = weight.sum() > _MAX_OFFSET_ERROR**-2
    return float((value * weight).sum() / weight.sum()) if known else math.nan


def _offset_of_pair(
    image: np.ndarray, world: np.ndarray, poses: np.ndarray, intrinsics: np.ndarray, baseline: float
) -> tuple[float, float]:
    """Offset and its standard error, pixels, from f32[N,2,2] points seen in two frames at f64[N,2,3]."""
    depth = np.einsum("kj,nkj->nk", poses[:, 2, :3], world) + poses[:, 2, 3]
    measured = intrinsics[0, 0] * baseline / depth
    rays = np.column_stack([image[:, 0].astype(np.float64) + 0.5, np.ones(len(image))]) @ np.linalg.inv(intrinsics).T
    between = _compose(poses[1], invert_poses(poses[:1])[0])
    turn = Rotation.from_matrix(between[:, :3])

    def errors(step: np.ndarray, true: np.ndarray) -> np.ndarray:
        """Pixels f64[N,4] off, points having disparity `true` in the first frame: there, in the second, its place."""
        pose = np.column_stack([(Rotation.from_rotvec(step[:3]) * turn).as_matrix(), between[:, 3] + step[3:6]])
        points, ahead = project(rays * (intrinsics[0, 0] * baseline / true)[:, None], pose, intrinsics)
        seen = intrinsics[0, 0] * baseline / np.maximum(ahead, 1e-3)
        return np.column_stack([np.column_stack([true, seen]) + step[6] - measured, points - image[:, 1]])

    def residuals(step: np.ndarray) -> np.ndarray:
        # Each point's own disparity is free: taken as measured, its noise would pass for an offset.
        true = np.maximum(measured[:, 0] - step[6], 0.05)
        start = errors(step, true)
        slope = (errors(step, true + 1e-3) - start) / 1e-3
        best = (start * slope).sum(1, keepdims=True) / (slope**2).sum(1, keepdims=True)
        return (start - best * slope).ravel()

    found = least_squares(residuals, np.zeros(7), loss="soft_l1", f_scale=_NOISE, x_scale=[0.01] * 3 + [0.05] * 3 + [1])
    if found.x[6] > 0.5 * np.median(measured):  # most of the disparity: everything could as well be at infinity
        return math.nan, math.inf
    return float(found.x[6]), _standard_error(found.jac, residuals(found.x), 6)


def _compose(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The rigid motion f64[3,4] of `second`, then `first`."""
    return np.column_stack([first[:, :3] @ second[:, :3], first[:, :3] @ second[:, 3] + first[:, 3]])


def _standard_error(jacobian: np.ndarray, residuals: np.ndarray, index: int) -> float:
    """Of one parameter of a least-squares fit, by the residuals' median; inf where they do not fix it."""
    scale = 1.4826 * float(np.median(np.abs(residuals)))
    normal = jacobian.T @ jacobian
    if np.linalg.matrix_rank(normal) < len(normal):
        return math.inf
    return max(scale, 1e-3) * float(np.sqrt(np.linalg.inv(normal)[index, index]))


def likely_cause(left: np.ndarray, right: np.ndarray, max_disparity: int) -> str:
    """Say why a pair u8[H,W,3] may match so badly: swapped eyes, or too small a search; "" if neither helps."""
    share = float(match_pair(left, right, max_disparity)[1].mean())
    swapped = float(match_pair(right, left, max_disparity)[1].mean())
    if swapped > max(1.5 * share, 0.3):
        return (
            f"the eyes look swapped: the other way round {100 * swapped:.0f} % of the pixels match instead of "
            f"{100 * share:.0f} % (check which file is left, or stereo.layout)"
        )
    beyond, needed = beyond_search(left, right, max_disparity)
    if beyond > MAX_BEYOND:
        return (
            f"the search is too small: {100 * beyond:.0f} % of the pixels match beyond {max_disparity} px (set "
            f"stereo.max_disparity to {needed})"
        )
    return ""
