"""A camera's pose from points with known positions: PnP with RANSAC, robust refinement."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from data_prep.stereo.features import project

MIN_INLIERS = 24  # fewer points do not fix six numbers against outliers
_MIN_INLIER_RATIO = 0.35
_RANSAC_ERROR = 2.0  # pixels
_RANSAC_ROUNDS = 300
_REFINE_ROUNDS, _REFINE_STEPS = 4, 4  # rounds of so many steps, each with the scale of the residuals left before it


def fit_pose(
    world: np.ndarray, points: np.ndarray, intrinsics: np.ndarray, guess: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Find the pose of a view by the points that it shows, some of them wrong: PnP with RANSAC, then `refine_pose`.

    Takes and returns what `refine_pose` does, but `guess` f64[3,4] world->camera may be as far off as a frame's motion.
    """
    if len(world) < MIN_INLIERS:
        return None
    found, turn, shift, chosen = cv2.solvePnPRansac(
        world,
        points.astype(np.float64) + 0.5,
        intrinsics,
        None,
        rvec=Rotation.from_matrix(guess[:, :3]).as_rotvec(),
        tvec=guess[:, 3:].copy(),
        useExtrinsicGuess=True,
        iterationsCount=_RANSAC_ROUNDS,
        reprojectionError=_RANSAC_ERROR,
        confidence=0.9999,
        flags=cv2.SOLVEPNP_EPNP,
    )
    if not found or chosen is None or len(chosen) < max(MIN_INLIERS, _MIN_INLIER_RATIO * len(world)):
        return None
    start = np.column_stack([Rotation.from_rotvec(turn.ravel()).as_matrix(), shift])
    return refine_pose(world, points, intrinsics, start)


def refine_pose(
    world: np.ndarray, points: np.ndarray, intrinsics: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Minimise the reprojection error under Tukey's loss, from a start within a few pixels.

    The loss has the scale of the residuals (median absolute, at least 0.1 px), so points that move by a few tenths of a
    pixel, well inside RANSAC's threshold, lose their say too.

    Args:
      world: f64[N,3] metres.
      points: f32[N,2] array coordinates (pixel centres are whole numbers).
      intrinsics: f64[3,3] pixels.
      start: f64[3,4] world->camera.

    Returns:
      pose f64[3,4], inliers bool[N], their rms in pixels; None if too few agree.
    """
    ahead = project(world, start, intrinsics)[1] > 0
    seen = _Seen(world[ahead] @ start[:, :3].T + start[:, 3], points[ahead], intrinsics)
    step = np.zeros(6)
    for _ in range(_REFINE_ROUNDS):
        size = np.linalg.norm(seen.residuals(step).reshape(-1, 2), axis=1)
        limit = 4.685 * max(1.4826 * float(np.median(size)), 0.1)
        step = least_squares(seen.residuals, step, seen.slopes, loss=_tukey, f_scale=limit, max_nfev=_REFINE_STEPS).x
    turn = Rotation.from_rotvec(step[:3]).as_matrix()
    pose = turn @ start + np.column_stack([np.zeros((3, 3)), step[3:]])
    image, depth = project(world, pose, intrinsics)
    size = np.linalg.norm(image - points, axis=1)
    inlier = (size < _RANSAC_ERROR) & (depth > 0)
    if inlier.sum() < max(MIN_INLIERS, _MIN_INLIER_RATIO * len(world)):
        return None
    return pose, inlier, float(np.sqrt((size[inlier] ** 2).mean()))


@dataclasses.dataclass(frozen=True, eq=False)
class _Seen:
    """Points of a view, and where they lie before its camera by a pose that is to be improved by a step f64[6].

    The step turns by its first three numbers (a rotation vector), then shifts by the others.

    Attributes:
      camera: f64[N,3], positions in the camera's frame.
      points: f32[N,2] array coordinates.
      intrinsics: f64[3,3].
    """

    camera: np.ndarray
    points: np.ndarray
    intrinsics: np.ndarray

    def residuals(self, step: np.ndarray) -> np.ndarray:
        """Return f64[2N]: x and y of where a step puts each point, less where it was seen."""
        pose = np.column_stack([Rotation.from_rotvec(step[:3]).as_matrix(), step[3:]])
        return (project(self.camera, pose, self.intrinsics)[0] - self.points).ravel()

    def slopes(self, step: np.ndarray) -> np.ndarray:
        """Return f64[2N,6], the derivatives of `residuals`."""
        turned = self.camera @ Rotation.from_rotvec(step[:3]).as_matrix().T
        image = (turned + step[3:]) @ self.intrinsics.T
        ratio = image[:, :2] / image[:, 2:]
        by_shift = (self.intrinsics[:2] - ratio[:, :, None] * self.intrinsics[2]) / image[:, 2, None, None]  # [N,2,3]
        # A small turn w moves a turned point by w x point, so the row of a coordinate with slope g has point x g.
        by_turn = np.cross(turned[:, None], by_shift) @ _turn_slope(step[:3])
        return np.concatenate([by_turn, by_shift], 2).reshape(-1, 6)


def _turn_slope(vector: np.ndarray) -> np.ndarray:
    """f64[3,3]: the small turn that follows the turn by a rotation vector, by small changes of that vector.

    The left Jacobian of SO(3) in closed form (Sola et al., arXiv 1812.01537, eq. 145).
    """
    angle = float(np.linalg.norm(vector))
    cross = np.cross(np.eye(3), vector)  # of any x: vector x x
    if angle < 1e-4:  # the fractions lose their digits; the next terms are 1e-9 and less
        return np.eye(3) + cross / 2 + cross @ cross / 6
    first, second = (1 - np.cos(angle)) / angle**2, (angle - np.sin(angle)) / angle**3
    return np.eye(3) + first * cross + second * cross @ cross


def _tukey(squares: np.ndarray) -> np.ndarray:
    """Tukey's loss and its slope, f64[3, 2N], of squared residuals (x and y of N points in turn) over its limit.

    Both coordinates of a point share one weight. The curvature is given as 0, which makes every step one of reweighted
    least squares.
    """
    inside = np.repeat(1 - np.minimum(squares.reshape(-1, 2).sum(1), 1), 2)
    return np.stack([(1 - inside**3) / 6, inside**2, np.zeros_like(inside)])
