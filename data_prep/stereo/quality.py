"""Figures of how well a stereo clip was reconstructed, and what a clip must keep of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from data_prep.stereo.checks import MAX_BEYOND, row_errors
from data_prep.stereo.disparity import StereoError
from data_prep.stereo.tracks import PointTracks
from data_prep.stereo.trajectory import Trajectory

_UNKNOWN_IS_FINE = ("row_curvature", "disparity_offset")  # most clips do not tell; what is told is believed
_CAUSES = {
    "vertical_error": "the views are not rectified",
    "row_curvature": "the views are not perspective (fisheye, equirectangular): project them to perspective",
    "disparity_offset": 'the eyes\' principal points differ: rectify, or write this number as "disparity_offset" into '
    "<clip>-clip.json",
}


@dataclasses.dataclass(frozen=True)
class Quality:
    """Figures of one clip; those of pixels are at the resolution matched.

    Attributes:
      valid_disparity: share of pixels with a disparity, mean over frames.
      left_right_error: median pixels between a match and the way back, where matched.
      median_disparity: pixels over valid ones; below about 2 a pixel's tenth is 5 % of depth.
      vertical_error: median |row difference| in pixels of points matched between the views; rectified pairs: ~0.
      beyond_search: share of the pixels that match beyond the range of the search, in the frame in the middle.
      row_curvature: how rows bend with disparity: 0 in perspective views, about 2/3 in fisheye ones; NaN = not told.
      reprojection_rms: pixels, worst frame.
      inlier_ratio: share of followed points that agree with the camera pose, worst frame.
      static_drift: median over background tracks of their spread in the world relative to their depth; it sees errors
        of depth and pose together (a scale error of the whole clip, e.g. a wrong baseline, it cannot see).
      disparity_offset: pixels that all disparities are too large, as far as the camera's motion tells; NaN = not told.
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
    beyond_search: float
    row_curvature: float = math.nan
    disparity_offset: float = math.nan

    @classmethod
    def of(
        cls, figures: Mapping[str, float], trajectory: Trajectory, tracks: PointTracks, scale: str, offset: float
    ) -> Self:
        """Compute all figures of a clip; `figures` are those of matching, `offset` that of its disparities."""
        return cls(
            **figures,
            disparity_offset=offset,
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
    max_beyond_search: float | None = MAX_BEYOND
    max_row_curvature: float | None = 0.12
    max_disparity_offset: float | None = 0.6


def require_quality(figures: Mapping[str, float], limits: QualityLimits, clip_id: str) -> None:
    """Refuse a clip whose figures break a limit ("valid_disparity 0.12 is below 0.3").

    Args:
      figures: named as in `Quality`; those not measured yet may be absent. None or NaN (could not be measured) breaks
        its limit, unless it is one of those that few clips tell (`row_curvature`, `disparity_offset`).

    Raises:
      StereoError: reason "low_quality", naming every broken limit.
    """
    broken = []
    for field, limit in dataclasses.asdict(limits).items():
        side, name = field.split("_", 1)
        if limit is None or name not in figures:
            continue
        value = figures[name]
        cause = f" ({_CAUSES[name]})" if name in _CAUSES else ""
        if value is None or math.isnan(value):
            broken += [] if name in _UNKNOWN_IS_FINE else [f"{name} could not be measured"]
        elif side == "min" and value < limit:
            broken.append(f"{name} {value:.3g} is below {limit:g}{cause}")
        elif side == "max" and abs(value) > limit:
            broken.append(f"{name} {value:.3g} is {'beyond' if value < 0 else 'above'} {limit:g}{cause}")
    if broken:
        raise StereoError(f"clip {clip_id}: {'; '.join(broken)}", "low_quality")


def vertical_error(left: np.ndarray, right: np.ndarray, disparity: np.ndarray, valid: np.ndarray) -> float:
    """Measure the median |row difference| in pixels of points that `row_errors` follows; NaN if none is."""
    return median(np.abs(row_errors(left, right, disparity, valid)[1]))


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


def median(values: Sequence[float]) -> float:
    """Of the finite values; NaN if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return float(np.median(finite)) if finite else math.nan
