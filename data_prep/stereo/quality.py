"""Figures that tell whether a clip's stereo reconstruction can be trusted, and limits that reject it with a reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Self

import numpy as np

from data_prep.stereo.disparity import StereoError
from data_prep.stereo.features import follow_points, grey_frames, seed_points
from data_prep.stereo.tracks import PointTracks
from data_prep.stereo.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Quality:
    """Figures of one clip; those of pixels are at the resolution matched.

    Attributes:
      valid_disparity: share of pixels with a disparity, mean over frames.
      left_right_error: median pixels between a match and the way back, where matched.
      median_disparity: pixels over valid ones; below about 2 a pixel's tenth is 5 % of depth.
      vertical_error: median |row difference| in pixels of points matched between the views; rectified pairs: ~0.
      reprojection_rms: pixels, worst frame.
      inlier_ratio: share of followed points that agree with the camera pose, worst frame.
      static_drift: median over background tracks of their spread in the world relative to their depth; it sees errors
        of depth and pose together (a scale error of the whole clip, e.g. a wrong baseline, it cannot see).
      path_length: metres along the camera's centres.
      keyframes: number.
      scale: "metric" or "assumed_baseline".
    """

    valid_disparity: float
    left_right_error: float
    median_disparity: float
    vertical_error: float
    reprojection_rms: float
    inlier_ratio: float
    static_drift: float
    path_length: float
    keyframes: int
    scale: str

    @classmethod
    def of(cls, figures: Mapping[str, float], trajectory: Trajectory, tracks: PointTracks, scale: str) -> Self:
        """Compute all figures of a clip; `figures` are those of matching."""
        return cls(
            **figures,
            reprojection_rms=float(trajectory.reprojection_rms.max()),
            inlier_ratio=float(trajectory.inlier_ratio.min()),
            static_drift=static_drift(tracks, trajectory),
            path_length=trajectory.path_length,
            keyframes=len(trajectory.keyframes),
            scale=scale,
        )

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Return a JSON-able object: figures that could not be measured (NaN) become None."""
        items = dataclasses.asdict(self).items()
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in items}


@dataclasses.dataclass(frozen=True)
class QualityLimits:
    """What a clip must keep; names as in `Quality`. None switches a limit off."""

    min_valid_disparity: float | None = 0.3
    max_left_right_error: float | None = 0.5
    min_median_disparity: float | None = 1.5
    max_vertical_error: float | None = 1.0
    max_reprojection_rms: float | None = 1.0
    min_inlier_ratio: float | None = 0.4
    max_static_drift: float | None = 0.05
    max_path_length: float | None = None


def require_quality(figures: Mapping[str, float], limits: QualityLimits, clip_id: str) -> None:
    """Refuse a clip whose figures break a limit ("valid_disparity 0.12 is below 0.3").

    Args:
      figures: named as in `Quality`; those not measured yet may be absent. None or NaN (could not be measured) breaks
        its limit.

    Raises:
      StereoError: reason "low_quality", naming every broken limit.
    """
    broken = []
    for field, limit in dataclasses.asdict(limits).items():
        side, name = field.split("_", 1)
        if limit is None or name not in figures:
            continue
        value = figures[name]
        if value is None or math.isnan(value):
            broken.append(f"{name} could not be measured")
        elif side == "min" and value < limit:
            broken.append(f"{name} {value:.3g} is below {limit:g}")
        elif side == "max" and value > limit:
            broken.append(f"{name} {value:.3g} is above {limit:g}")
    if broken:
        raise StereoError(f"clip {clip_id}: {'; '.join(broken)}", "low_quality")


def vertical_error(
    left: np.ndarray, right: np.ndarray, disparity: np.ndarray, valid: np.ndarray, points: int = 200
) -> float:
    """Measure the median |row difference| in pixels of points followed from the left to the right view; NaN if none is.

    Args:
      left, right: u8[H,W,3].
      disparity: f32[H,W] pixels, where to start looking.
      valid: bool[H,W].
    """
    first, second = grey_frames(np.stack([left, right]))
    start = seed_points(first, valid, points)
    shift = disparity[np.rint(start[:, 1]).astype(int), np.rint(start[:, 0]).astype(int)]
    found, good = follow_points(first, second, start, guess=start - np.column_stack([shift, np.zeros_like(shift)]))
    return float(np.median(np.abs(found[good, 1] - start[good, 1]))) if good.any() else math.nan


def static_drift(tracks: PointTracks, trajectory: Trajectory) -> float:
    """Measure the median over background tracks (2 sightings or more) of rms distance from their mean / distance to it.

    NaN without such tracks. Tracks of unmasked moving objects are few enough not to move a median.
    """
    world = tracks.world[tracks.labels == -1]
    world = world[np.isfinite(world[..., 0]).sum(1) >= 2]
    if not len(world):
        return math.nan
    mean = np.nanmean(world, axis=1, keepdims=True)
    spread = np.sqrt(np.nanmean(((world - mean) ** 2).sum(-1), axis=1))
    distance = np.linalg.norm(mean - trajectory.camera_centers[None], axis=2).mean(1)
    return float(np.median(spread / distance))
