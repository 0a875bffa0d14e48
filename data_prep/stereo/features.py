"""Image points: where to seed them, how to follow them, and how they become 3-D points (pixel centres at +0.5)."""

from __future__ import annotations

import cv2
import numpy as np

_GRID = 16  # cells per side: seeds are spread over the image, so that no one well-textured corner decides the pose
_LK = {
    "winSize": (15, 15),
    "maxLevel": 3,
    "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003),
    "minEigThreshold": 1e-4,
    "flags": cv2.OPTFLOW_USE_INITIAL_FLOW,
}
_MIN_ISOTROPY = 0.06  # weakest / strongest gradient direction inside the window; points on a stripe slide along it
_EDGE_RANGE = 0.1  # depth changing by more than this fraction inside a window marks an object's border
_EDGE_WINDOW = 7
_FEATURES, _FEATURE_RATIO = 4000, 0.8


def grey_frames(frames: np.ndarray) -> np.ndarray:
    """Convert u8[T,H,W,3] RGB to u8[T,H,W]."""
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def seed_points(grey: np.ndarray, allowed: np.ndarray, count: int, taken: np.ndarray | None = None) -> np.ndarray:
    """Choose up to `count` well-trackable points, the strongest of each grid cell first.

    Args:
      grey: u8[H,W].
      allowed: bool[H,W], where points may lie.
      count: how many at most.
      taken: f32[M,2] points already followed; no seed falls closer to them than the seeds' own spacing.

    Returns:
      f32[N,2] (column, row) array coordinates (0 = centre of the first pixel).
    """
    height, width = grey.shape
    spacing = max(2, int(0.5 * (allowed.sum() / max(count, 1)) ** 0.5))
    mask = np.where(allowed, 255, 0).astype(np.uint8)
    if taken is not None:
        for column, row in np.rint(taken).astype(int):
            cv2.circle(mask, (int(column), int(row)), spacing, 0, -1)
    found = cv2.goodFeaturesToTrack(grey, 4 * count, 0.002, spacing, mask=mask, blockSize=5)
    if found is None:
        return np.zeros((0, 2), np.float32)
    points = found.reshape(-1, 2).astype(np.float32)  # strongest first
    points = points[sample_mask(_isotropic(grey), points)]
    cells = (points[:, 1] * _GRID // height).astype(int) * _GRID + (points[:, 0] * _GRID // width).astype(int)
    order = np.argsort(cells, kind="stable")
    starts = np.searchsorted(cells[order], cells[order])
    rank = np.empty(len(points), int)
    rank[order] = np.arange(len(points)) - starts  # place within its cell
    return points[np.argsort(rank, kind="stable")[:count]]


def _isotropic(grey: np.ndarray) -> np.ndarray:
    """bool[H,W]: the tracking window around a pixel holds gradients of more than one direction (no aperture problem).

    Forward-backward checks do not see such sliding: it is the same both ways.
    """
    strongest, weakest = np.moveaxis(cv2.cornerEigenValsAndVecs(grey, _LK["winSize"][0], 3)[..., :2], -1, 0)
    low, high = np.minimum(strongest, weakest), np.maximum(strongest, weakest)
    return low > _MIN_ISOTROPY * high


def follow_points(
    first: np.ndarray, second: np.ndarray, points: np.ndarray, guess: np.ndarray | None = None, max_error: float = 0.7
) -> tuple[np.ndarray, np.ndarray]:
    """Follow points by pyramidal Lucas-Kanade with forward-backward check.

    Args:
      first, second: u8[H,W].
      points: f32[N,2] array coordinates in `first`.
      guess: f32[N,2] where to start looking in `second`; None = at `points`.
      max_error: pixels by which the way back may miss its start (Stereo4D allows 1).

    Returns:
      f32[N,2] in `second`, and bool[N]: found, back at its start, and inside the image.
    """
    if not len(points):
        return points.astype(np.float32), np.zeros(0, bool)
    start = points.astype(np.float32).reshape(-1, 1, 2)
    expected = start if guess is None else guess.astype(np.float32).reshape(-1, 1, 2)
    moved, found, _ = cv2.calcOpticalFlowPyrLK(first, second, start, expected.copy(), **_LK)
    moved = np.where(np.isfinite(moved), moved, -1e4).astype(np.float32)
    # The way back starts from the answer less what was expected of it (and of all points), not from the known start: it
    # must find the point by itself.
    surprise = np.median(moved - expected, axis=0, keepdims=True)
    back_guess = (moved - (expected - start) - surprise).astype(np.float32)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(second, first, moved, back_guess, **_LK)
    good = (found.ravel() > 0) & (found_back.ravel() > 0)
    good &= np.linalg.norm((back - start).reshape(-1, 2), axis=1) <= max_error
    moved = moved.reshape(-1, 2)
    height, width = first.shape
    good &= (moved >= 0).all(1) & (moved[:, 0] <= width - 1) & (moved[:, 1] <= height - 1)
    return moved, good


def match_features(
    first: np.ndarray, second: np.ndarray, first_allowed: np.ndarray, second_allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Match SIFT features of two views u8[H,W], whatever the motion between them; following needs a start nearby.

    A match is the nearest descriptor both ways and clearly nearer than the second nearest (Lowe's ratio test).

    Args:
      first, second: u8[H,W].
      first_allowed, second_allowed: bool[H,W], where features may lie.

    Returns:
      f32[N,2] array coordinates in each view.
    """
    detector = cv2.SIFT_create(_FEATURES)
    masks = (first_allowed.astype(np.uint8), second_allowed.astype(np.uint8))
    found = [detector.detectAndCompute(grey, mask) for grey, mask in zip((first, second), masks, strict=True)]
    (ours, looks), (theirs, other_looks) = found
    if min(len(ours), len(theirs)) < 2:
        return np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)
    there = cv2.BFMatcher().knnMatch(looks, other_looks, k=2)
    back = {match.queryIdx: match.trainIdx for match in cv2.BFMatcher().match(other_looks, looks)}
    kept = [a for a, b in there if a.distance < _FEATURE_RATIO * b.distance and back[a.trainIdx] == a.queryIdx]
    pairs = [(ours[a.queryIdx].pt, theirs[a.trainIdx].pt) for a in kept]
    points = np.array(pairs, np.float32).reshape(-1, 2, 2)
    return points[:, 0], points[:, 1]


def patches(grey: np.ndarray, points: np.ndarray, size: int = 13) -> np.ndarray:
    """Cut windows around f32[N,2] array coordinates of u8[H,W], each of zero mean and unit norm: f32[N,size*size].

    The dot product of two windows is their normalised cross-correlation.
    """
    if not len(points):
        return np.zeros((0, size * size), np.float32)
    offsets = np.arange(size, dtype=np.float32) - (size - 1) / 2
    columns = np.broadcast_to(points[:, 0, None, None] + offsets, (len(points), size, size))
    rows = np.broadcast_to(points[:, 1, None, None] + offsets[:, None], (len(points), size, size))
    maps = [np.ascontiguousarray(m.reshape(-1, size), np.float32) for m in (columns, rows)]
    taken = cv2.remap(grey, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
    taken = taken.reshape(len(points), -1)
    taken -= taken.mean(1, keepdims=True)
    return taken / np.maximum(np.linalg.norm(taken, axis=1, keepdims=True), 1e-6)


def clear_of_edges(depth: np.ndarray) -> np.ndarray:
    """Set depth f32[H,W] to NaN near depth steps too, where a window sees two surfaces and the depth is of either."""
    kernel = np.ones((_EDGE_WINDOW, _EDGE_WINDOW), np.uint8)
    known = np.isfinite(depth) & (depth > 0)
    far = cv2.dilate(np.where(known, depth, -np.inf).astype(np.float32), kernel)
    near = cv2.erode(np.where(known, depth, np.inf).astype(np.float32), kernel)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(known & (far - near <= _EDGE_RANGE * near), depth, np.nan).astype(np.float32)


def sample_depth(depth: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Read depth at f32[N,2] array coordinates, f64[N]; bilinear in 1/z (planes are linear in it); NaN beside a NaN."""
    height, width = depth.shape
    column = np.clip(points[:, 0].astype(np.float64), 0, width - 1)
    row = np.clip(points[:, 1].astype(np.float64), 0, height - 1)
    c0 = np.minimum(column.astype(int), max(width - 2, 0))
    r0 = np.minimum(row.astype(int), max(height - 2, 0))
    c1, r1 = np.minimum(c0 + 1, width - 1), np.minimum(r0 + 1, height - 1)
    fc, fr = column - c0, row - r0
    inverse = 1.0 / depth.astype(np.float64)[np.stack([r0, r0, r1, r1]), np.stack([c0, c1, c0, c1])]
    top, bottom = inverse[0] * (1 - fc) + inverse[1] * fc, inverse[2] * (1 - fc) + inverse[3] * fc
    return 1.0 / (top * (1 - fr) + bottom * fr)


def sample_mask(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Read a mask bool[H,W] at the pixel of each f32[N,2] array coordinate, bool[N]."""
    height, width = mask.shape
    column = np.clip(np.rint(points[:, 0]).astype(int), 0, width - 1)
    row = np.clip(np.rint(points[:, 1]).astype(int), 0, height - 1)
    return mask[row, column]


def backproject(
    points: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray, world_to_camera: np.ndarray
) -> np.ndarray:
    """Return world points f64[N,3] of array coordinates f32[N,2] at depths f64[N] in the camera f64[3,4]."""
    rays = np.column_stack([points.astype(np.float64) + 0.5, np.ones(len(points))]) @ np.linalg.inv(intrinsics).T
    return (rays * depth[:, None] - world_to_camera[:, 3]) @ world_to_camera[:, :3]


def project(world: np.ndarray, world_to_camera: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return array coordinates f64[N,2] and depths f64[N] of world points f64[N,3] in the camera f64[3,4]."""
    camera = world @ world_to_camera[:, :3].T + world_to_camera[:, 3]
    image = camera @ intrinsics.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return image[:, :2] / image[:, 2:] - 0.5, camera[:, 2]
