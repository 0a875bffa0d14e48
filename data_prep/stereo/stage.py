"""A rectified stereo clip -> depth, camera path, tracks, object points and quality, without any given pose."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from data_prep.scenes.objects import Caption, unmasked
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
from data_prep.stereo.quality import Quality, QualityLimits, median, require_quality
from data_prep.stereo.tracks import PointTracks, reject_outliers, track_points
from data_prep.stereo.trajectory import Trajectory, solve_trajectory

STEREO4D_BASELINE = 0.063  # metres: what Stereo4D assumes for every VR180 camera
_MIN_OBJECT_POINTS = 4
_MIN_IN_RANGE = 0.1  # share of the matched pixels whose depth is one that the stage keeps


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

    Objects without masks, or of which fewer than four points could be followed, are left out of the scene and named
    under `provenance["objects_left_out"]`.

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
    with _naming_cause(left[middle], right[middle], search):
        depths, trajectory, tracks, quality = _measure(left, right, frames, masks, setting, scale, limits, clip_id)
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


@contextlib.contextmanager
def _naming_cause(left: np.ndarray, right: np.ndarray, search: int) -> Iterator[None]:
    """Add the likely cause, if a pair u8[H,W,3] shows one, to a StereoError that is raised inside."""
    try:
        yield
    except StereoError as error:
        cause = likely_cause(left, right, search)
        if not cause:
            raise
        told = StereoError(f"{error}; {cause}", error.reason)
        told.frame = error.frame
        raise told from error


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
        figures = {"valid_disparity": np.mean(shares), "left_right_error": median(errors)}
        figures |= {"median_disparity": median(medians), "vertical_error": median(np.abs(lower))}
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
    return tuple(found), left_out | unmasked(masks, captions)
