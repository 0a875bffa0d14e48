"""A rectified stereo clip -> depth, camera path, tracks, object points and quality, without any given pose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from data_prep.scenes.objects import Caption
from data_prep.scenes.scene import Scene, SceneObject
from data_prep.stereo.checks import MAX_BEYOND, likely_cause, row_curvature, row_errors
from data_prep.stereo.checks import disparity_offset as measure_offset
from data_prep.stereo.disparity import (
    MAX_DEPTH,
    MIN_DEPTH,
    StereoError,
    beyond_search,
    check_array,
    depth_from_disparity,
    match_pair,
)
from data_prep.stereo.tracks import PointTracks, reject_outliers, track_points
from data_prep.stereo.trajectory import Trajectory, solve_trajectory

STEREO4D_BASELINE = 0.063  # metres: what Stereo4D assumes for every VR180 camera
_MIN_OBJECT_POINTS = 4
_MIN_IN_RANGE = 0.1  # share of the matched pixels whose depth is one that the stage keeps
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
    return _median(np.abs(row_errors(left, right, disparity, valid)[1]))


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


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """All that the stage found; `scene` is what later stages read.

    Attributes:
      scene: poses and object points.
      depths: f32[T,H,W] metres of the left view, NaN = unknown, or not of a frame used.
      quality: figures of the clip.
    """

    scene: Scene
    depths: np.ndarray
    quality: Quality


def reconstruct_clip(
    left: np.ndarray,
    right: np.ndarray,
    *,
    clip_id: str,
    source_id: str,
    timestamps: np.ndarray,
    intrinsics: np.ndarray,
    baseline: float | None = None,
    masks: Mapping[str, np.ndarray] = MappingProxyType({}),
    captions: Mapping[str, Caption] = MappingProxyType({}),
    max_disparity: int | None = None,
    max_depth: float = MAX_DEPTH,
    disparity_offset: float = 0.0,
    used: Sequence[int] | None = None,
    limits: QualityLimits = QualityLimits(),  # noqa: B008 - frozen
    provenance: Mapping[str, Any] = MappingProxyType({}),
) -> Reconstruction:
    """Find depth, camera path, tracks and object points of a rectified stereo clip, without any given pose.

    Objects of which fewer than four points could be followed are left out of the scene and named under
    `provenance["objects_left_out"]`.

    Args:
      left, right: u8[T,H,W,3] RGB; the world is the left camera of frame 0.
      clip_id, source_id: of the scene.
      timestamps: f64[T] seconds.
      intrinsics: f64[3,3] pixels, one camera for the clip.
      baseline: metres between the optical centres. None = 0.063 as Stereo4D assumes; the scene's scale then says
        "assumed_baseline" instead of "metric".
      masks: per object id, bool[T,H,W] in the left view; objects are kept out of the camera's pose.
      captions: per object id, what it is called; without one its name stays empty.
      max_disparity: pixels; None = an eighth of the width (64 at 512; at 60 degrees and 63 mm down to 0.44 m), or as
        many as the frame in the middle needs.
      max_depth: metres; farther pixels count as unknown.
      used: frames that will be asked about, ascending; only they and keyframes of the camera's path get a depth, and
        only they figures of matching. None = all.
      disparity_offset: pixels to take from every disparity: by how much the eyes' principal points differ.
      limits: the clip is rejected when it breaks one.
      provenance: added to the scene's, e.g. files.

    Raises:
      StereoError: bad input, no pose for a frame, or quality below the limits; `reason` tells which.
      SceneError: ids, timestamps or provenance do not make a scene.
    """
    _check_clip(left, right, timestamps, intrinsics, masks)
    scale, metres = ("assumed_baseline", STEREO4D_BASELINE) if baseline is None else ("metric", baseline)
    frames = range(len(left)) if used is None else sorted(set(used))
    middle = frames[len(frames) // 2]
    beyond, search = (None, max_disparity) if max_disparity is not None else _usual_search(left[middle], right[middle])
    setting = _Matching(intrinsics, metres, search, max_depth, disparity_offset, beyond)
    try:
        depths, trajectory, tracks, quality = _measure(left, right, frames, masks, setting, scale, limits, clip_id)
    except StereoError as error:
        cause = likely_cause(left[middle], right[middle], search)
        if not cause:
            raise
        told = StereoError(f"{error}; {cause}", error.reason)
        told.frame = error.frame
        raise told from error
    found, left_out = _scene_objects(masks, captions, tracks)
    notes = {"tool": "data_prep.stereo.stage", "parameters": setting.parameters(), "quality": quality.as_dict()}
    scene = Scene(
        clip_id=clip_id,
        source_id=source_id,
        world_to_camera=trajectory.world_to_camera,
        intrinsics=np.broadcast_to(intrinsics, (len(left), 3, 3)),
        image_size=left.shape[1:3],
        timestamps=timestamps,
        objects=found,
        scale=scale,
        provenance={**provenance, **notes, "objects_left_out": left_out},
    )
    return Reconstruction(scene, depths, quality)


def _usual_search(left: np.ndarray, right: np.ndarray) -> tuple[float | None, int]:
    """Pixels of disparity to search by default, for a pair u8[H,W,3]; before them what lies beyond, None if unknown."""
    usual = max(1, left.shape[1] // 8)
    beyond, needed = beyond_search(left, right, usual)
    return (None, max(usual, needed)) if beyond > MAX_BEYOND else (beyond, usual)


def _measure(
    left: np.ndarray,
    right: np.ndarray,
    frames: Sequence[int],
    masks: Mapping[str, np.ndarray],
    setting: _Matching,
    scale: str,
    limits: QualityLimits,
    clip_id: str,
) -> tuple[np.ndarray, Trajectory, PointTracks, Quality]:
    """Depths f32[T,H,W] of `frames` and of keyframes, camera path, tracks, and figures that break no limit."""
    depths = _DepthMaps(left, right, setting)
    figures = depths.figures(frames)
    require_quality(figures, limits, clip_id)  # a bad match says more than the pose that fails because of it
    moving = np.logical_or.reduce(list(masks.values())) if masks else None
    trajectory = solve_trajectory(left, depths, setting.intrinsics, moving)
    poses = trajectory.world_to_camera
    tracks = track_points(left, depths.maps, setting.intrinsics, poses, list(masks.values()))
    offset = measure_offset(tracks, poses, setting.intrinsics, setting.baseline)
    quality = Quality.of(figures, trajectory, tracks, scale, offset)
    require_quality(quality.as_dict(), limits, clip_id)
    return depths.maps, trajectory, tracks, quality


def _check_clip(
    left: np.ndarray,
    right: np.ndarray,
    timestamps: np.ndarray,
    intrinsics: np.ndarray,
    masks: Mapping[str, np.ndarray],
) -> None:
    """Raises StereoError for arrays that are not of one clip, naming the first."""
    check_array("left", left, np.uint8, (None, None, None, 3))
    check_array("right", right, np.uint8, left.shape)
    check_array("intrinsics", intrinsics, np.float64, (3, 3))
    if np.shape(timestamps) != (len(left),):
        raise StereoError(f"{len(left)} frames need as many timestamps, got {list(np.shape(timestamps))}")
    for name, mask in masks.items():
        check_array(f"masks of object {name!r}", mask, bool, left.shape[:3])


@dataclasses.dataclass(frozen=True, eq=False)
class _Matching:
    """How disparities are found and become metres."""

    intrinsics: np.ndarray
    baseline: float
    max_disparity: int
    max_depth: float
    offset: float
    beyond: float | None  # share of the frame in the middle that lies beyond the search; None if it was not looked for

    def parameters(self) -> dict[str, float]:
        """What a scene's provenance says of it."""
        named = {"baseline": self.baseline, "max_disparity": self.max_disparity, "max_depth": self.max_depth}
        return named | {"disparity_offset": self.offset}


class _DepthMaps:
    """Depth maps of a clip, each found when it is first asked for; indexed by frame like an f32[T,H,W].

    Attributes:
      maps: f32[T,H,W] metres, NaN = unknown, or not asked for.
    """

    def __init__(self, left: np.ndarray, right: np.ndarray, setting: _Matching):
        self.maps = np.full(left.shape[:3], np.nan, np.float32)
        self.shape, self.ndim, self.dtype = self.maps.shape, self.maps.ndim, self.maps.dtype
        self._views, self._setting, self._known = (left, right), setting, set()

    def __getitem__(self, frame: int) -> np.ndarray:
        if frame not in self._known:
            self.find(frame)
        return self.maps[frame]

    def find(self, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Match a frame's pair and keep its depth; return what `match_pair` found."""
        setting = self._setting
        found, valid, left_right = match_pair(*(view[frame] for view in self._views), setting.max_disparity)
        disparity = found - np.float32(setting.offset)
        self.maps[frame] = depth_from_disparity(
            disparity, valid, setting.intrinsics[0, 0], setting.baseline, setting.max_depth
        )
        self._known.add(frame)
        return found, valid, left_right

    def figures(self, frames: Sequence[int]) -> dict[str, float]:
        """Match those frames; return the figures of matching, named as in `Quality`."""
        shares, errors, medians, rows = [], [], [], []
        for frame in frames:
            disparity, valid, left_right = self.find(frame)
            shares.append(valid.mean())
            if valid.any():
                errors.append(np.median(left_right[valid]))
                medians.append(np.median(disparity[valid]))
            if frame in (frames[0], frames[len(frames) // 2], frames[-1]):
                rows.append(row_errors(*(view[frame] for view in self._views), disparity, valid))
        points, lower, further = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        figures = {"valid_disparity": np.mean(shares), "left_right_error": _median(errors)}
        figures |= {"median_disparity": _median(medians), "vertical_error": _median(np.abs(lower))}
        beyond, middle = self._setting.beyond, (view[frames[len(frames) // 2]] for view in self._views)
        if beyond is None:
            beyond, _ = beyond_search(*middle, self._setting.max_disparity)
        figures["beyond_search"] = beyond
        figures["row_curvature"] = row_curvature(points, lower, further, self._setting.intrinsics)
        _check_range(self.maps[frames], figures, self._setting)
        return {name: float(value) for name, value in figures.items()}


def _check_range(depths: np.ndarray, figures: Mapping[str, float], setting: _Matching) -> None:
    """Raises StereoError where views match, but hardly a depth is one that the stage keeps."""
    shown = np.isfinite(depths).mean()
    if figures["valid_disparity"] > 0 and shown < _MIN_IN_RANGE * figures["valid_disparity"]:
        usual = setting.intrinsics[0, 0] * setting.baseline / max(figures["median_disparity"], 1e-3)
        raise StereoError(
            f"the views match, but at a baseline of {setting.baseline:g} m the usual depth is {usual:.3g} m, and only "
            f"{MIN_DEPTH:g} to {setting.max_depth:g} m are kept. Is the baseline in metres (63 mm = 0.063)? Else see "
            "stereo.max_depth",
            "out_of_range",
        )


def _median(values: Sequence[float]) -> float:
    """Of the finite values; NaN if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return float(np.median(finite)) if finite else math.nan


def _scene_objects(
    masks: Mapping[str, np.ndarray], captions: Mapping[str, Caption], tracks: PointTracks
) -> tuple[tuple[SceneObject, ...], dict[str, str]]:
    """Objects with enough points, and why the others are left out."""
    found, left_out = [], {}
    for label, (name, mask) in enumerate(masks.items()):
        points = reject_outliers(tracks.of(label))
        points = points[:, np.isfinite(points[..., 0]).any(0)]
        if points.shape[1] < _MIN_OBJECT_POINTS:
            left_out[name] = f"{points.shape[1]} points followed with depth, {_MIN_OBJECT_POINTS} are needed"
        else:
            caption = captions.get(name, Caption(""))
            found.append(SceneObject(name, caption.description, caption.category, points, mask))
    return tuple(found), left_out
