"""The alternative without stereo (paper, ablation): SpatialTrackerV2 poses and tracks, brought to metres by MoGe-2.

SpatialTrackerV2 leaves an npz with time first: `coords` [T, N, 3] world, `extrinsics` [T, 4, 4] world->camera,
`intrinsics` [T, 3, 3] pixels, `visibs` [T, N]. MoGe-2 leaves one npz per picture: `depth` [H, W] metres, `mask` [H, W],
`intrinsics` [3, 3] normalised by the picture's sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.errors import SceneError
from data_prep.scenes.objects import project
from data_prep.scenes.scene import Scene, SceneObject, nearest_rigid
from data_prep.store.npz import read_npz

MAX_SPREAD = 0.1
_MIN_RATIOS = 30


@dataclasses.dataclass(frozen=True, eq=False)
class SpatialTracks:
    """What SpatialTrackerV2 says of a clip, in its own unit of length.

    Attributes:
      path: of the file.
      tracks: f64[N, T, 3] world, NaN = not visible.
      world_to_camera: f64[T, 3, 4].
      intrinsics: f64[T, 3, 3] pixels of the frames the tool was given.
    """

    path: str
    tracks: np.ndarray
    world_to_camera: np.ndarray
    intrinsics: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class MogeDepth:
    """MoGe-2's depth of one picture.

    Attributes:
      depth: f64[H, W] camera z, metres; NaN outside its mask.
      intrinsics: f64[3, 3] pixels of that H x W.
    """

    depth: np.ndarray
    intrinsics: np.ndarray


@dataclasses.dataclass(frozen=True)
class MetricScale:
    """Metres per unit of the tracker: the median ratio of depths, its relative spread, and how many points gave it.

    `spread` is half the distance between the 25 % and 75 % quantiles of the ratios, over the median.
    """

    factor: float
    spread: float
    points: int


def read_spatialtracker(path: str | Path) -> SpatialTracks:
    """Reads a SpatialTrackerV2 npz.

    Raises:
      SceneError: unreadable, or a key is missing, has another shape or type, or values that cannot be; naming it.
    """
    path = str(path)
    arrays = read_npz(path)
    extrinsics = _numbers(path, arrays, "extrinsics", (None, 4, 4))
    frames = len(extrinsics)
    if not frames or np.abs(extrinsics[:, 3] - (0, 0, 0, 1)).max() > 1e-4:
        raise SceneError(f"{path}: extrinsics must hold at least one pose with last row 0, 0, 0, 1")
    try:
        world_to_camera = nearest_rigid(extrinsics[:, :3])
    except SceneError as error:
        raise SceneError(f"{path}: extrinsics: {error}") from error
    coords = _numbers(path, arrays, "coords", (frames, None, 3), finite=False)
    count = coords.shape[1]
    visible = arrays.get("visibs", np.zeros(0))
    if visible.dtype.kind not in "bfiu" or visible.shape not in ((frames, count), (frames, count, 1)):
        raise SceneError(f"{path}: visibs is {visible.dtype}{list(visible.shape)}, expected [{frames}, {count}]")
    if not ((visible >= 0) & (visible <= 1)).all():  # False for NaN
        raise SceneError(f"{path}: visibs must be bool or probabilities within [0, 1]")
    visible = visible.reshape(frames, count).astype(np.float64) > 0.5
    if not np.isfinite(coords[visible]).all():
        raise SceneError(f"{path}: coords holds NaN or infinite points that are marked visible")
    coords[~visible] = np.nan
    intrinsics = _numbers(path, arrays, "intrinsics", (frames, 3, 3))
    return SpatialTracks(path, coords.swapaxes(0, 1), world_to_camera, intrinsics)


def read_moge(path: str | Path) -> MogeDepth:
    """Reads the npz of one picture.

    Raises:
      SceneError: as `read_spatialtracker`.
    """
    path = str(path)
    arrays = read_npz(path)
    depth = _numbers(path, arrays, "depth", (None, None), finite=False)
    mask = arrays.get("mask", np.zeros(0))
    if mask.shape != depth.shape or mask.dtype.kind not in "biu" or not depth.size:
        raise SceneError(f"{path}: mask must be bool of depth's size {list(depth.shape)}, not empty")
    mask = mask.astype(bool)
    if not (np.isfinite(depth[mask]) & (depth[mask] > 0)).all():
        raise SceneError(f"{path}: depth must be finite and above 0 within the mask")
    depth[~mask] = np.nan
    k = _numbers(path, arrays, "intrinsics", (3, 3))
    if not (0 < k[0, 0] < 20 and 0 < k[1, 1] < 20 and -1 < k[0, 2] < 2 and -1 < k[1, 2] < 2):
        raise SceneError(f"{path}: intrinsics must be normalised by the picture's width and height")
    height, width = depth.shape
    return MogeDepth(depth, k * np.array([[width], [height], [1.0]]))


def metric_scale(spatial: SpatialTracks, depths: Mapping[int, MogeDepth], image_size: tuple[int, int]) -> MetricScale:
    """Metres per unit of the tracker: median over visible points of MoGe's depth over the tracker's.

    Args:
      depths: per frame number; a few frames are enough.
      image_size: (height, width) of the tracker's frames; MoGe's may be larger or smaller.

    Raises:
      SceneError: a frame number outside the clip, or fewer than 30 points have both depths.
    """
    pixels, z = project(spatial.tracks, spatial.world_to_camera, spatial.intrinsics)
    ratios = []
    for frame, moge in depths.items():
        if not 0 <= frame < z.shape[1]:
            raise SceneError(f"MoGe depth of frame {frame}: {spatial.path} has frames 0 to {z.shape[1] - 1}")
        height, width = moge.depth.shape
        x = pixels[:, frame, 0] * (width / image_size[1])
        y = pixels[:, frame, 1] * (height / image_size[0])
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # False for NaN
        found = moge.depth[y[inside].astype(np.int64), x[inside].astype(np.int64)] / z[inside, frame]
        ratios.append(found[np.isfinite(found)])
    both = np.concatenate(ratios) if ratios else np.zeros(0)
    if len(both) < _MIN_RATIOS:
        raise SceneError(f"{spatial.path}: {len(both)} points have a MoGe depth, {_MIN_RATIOS} are needed for a scale")
    low, middle, high = np.quantile(both, (0.25, 0.5, 0.75))
    return MetricScale(float(middle), float((high - low) / 2 / middle), len(both))


def monocular_scene(
    spatial: SpatialTracks,
    image_size: tuple[int, int],
    timestamps: np.ndarray,
    *,
    clip_id: str,
    source_id: str,
    scale: MetricScale | None = None,
    max_spread: float = MAX_SPREAD,
    objects: tuple[SceneObject, ...] = (),
) -> tuple[Scene, np.ndarray]:
    """The scene and its tracks f64[N, T, 3], both times the metric factor.

    The scale flag is "metric" only where a factor is given whose spread is at most `max_spread`; otherwise "relative".

    Args:
      image_size: (height, width) of the frames the tracker was given.
      timestamps: f64[T] seconds.
      objects: in metres, as `objects.objects_from_tracks` makes them from the returned tracks.

    Raises:
      SceneError: something does not fit.
    """
    factor = 1.0 if scale is None else scale.factor
    poses = spatial.world_to_camera.copy()
    poses[:, :, 3] *= factor
    scene = Scene.from_world_to_camera(
        clip_id=clip_id,
        source_id=source_id,
        world_to_camera=poses,
        intrinsics=spatial.intrinsics,
        image_size=image_size,
        timestamps=timestamps,
        objects=objects,
        scale="metric" if scale is not None and scale.spread <= max_spread else "relative",
        provenance={
            "tool": "spatialtrackerv2" if scale is None else "spatialtrackerv2+moge2",
            "files": [Path(spatial.path).name],
            "parameters": {"max_spread": max_spread},
            "quality": {} if scale is None else dataclasses.asdict(scale),
        },
    )
    return scene, spatial.tracks * factor


def _numbers(
    path: str, arrays: Mapping[str, np.ndarray], key: str, shape: tuple[int | None, ...], finite: bool = True
) -> np.ndarray:
    """f64 copy of an array of `shape` (None = any)."""
    if key not in arrays:
        raise SceneError(f"{path}: no {key!r}; it has {sorted(arrays)[:20]}")
    array = arrays[key]
    fits = array.ndim == len(shape) and all(w is None or n == w for n, w in zip(array.shape, shape, strict=True))
    if array.dtype.kind not in "fiu" or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise SceneError(f"{path}: {key} is {array.dtype}{list(array.shape)}, expected numbers [{wanted}]")
    array = array.astype(np.float64)
    if finite and not np.isfinite(array).all():
        raise SceneError(f"{path}: {key} holds NaN or infinite values")
    return array
