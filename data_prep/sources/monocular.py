"""The `monocular` source (the paper's ablation): what SpatialTrackerV2 and MoGe-2 left beside each video.

`<clip>.mp4`, `<clip>-spatialtracker.npz`, and a folder `<clip>-moge` with one npz per frame that was measured, named by
the frame's number ("000012.npz"). If the tracker was given frames of another size than the video's, `<clip>-clip.json`
says so (`frame_size`); masks have that size too.

SpatialTrackerV2 leaves an npz with time first: `coords` [T, N, 3] world, `extrinsics` [T, 4, 4] world->camera,
`intrinsics` [T, 3, 3] pixels, `visibs` [T, N]. MoGe-2 leaves one npz per picture: `depth` [H, W] metres, `mask` [H, W],
`intrinsics` [3, 3] normalised by the picture's sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.scenes.objects import project
from data_prep.scenes.scene import Scene, nearest_rigid
from data_prep.sources.base import CAPTIONS, MASKS, LoadedClip, find, read_card, with_objects
from data_prep.store.untrusted import SceneError, as_scene_error, keep_visible, numbers, read_npz
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.qa.errors import MediaError

MAX_SPREAD = 0.1
_MIN_RATIOS = 30
_TRACKER = "-spatialtracker.npz"
_OFF_CENTRE = 0.1  # share of the side by which a principal point may lie off the middle


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


@dataclasses.dataclass(frozen=True)
class MetricScale:
    """Metres per unit of the tracker: the median ratio of depths, its relative spread, and how many points gave it.

    `spread` is half the distance between the 25 % and 75 % quantiles of the ratios, over the median.
    """

    factor: float
    spread: float
    points: int


def read_spatialtracker(path: str | Path) -> SpatialTracks:
    """Read a SpatialTrackerV2 npz.

    Raises:
      SceneError: unreadable, or a key is missing, has another shape or type, or values that cannot be; naming it.
    """
    path = str(path)
    arrays = read_npz(path)
    extrinsics = numbers(path, arrays, "extrinsics", (None, 4, 4))
    frames = len(extrinsics)
    if not frames or np.abs(extrinsics[:, 3] - (0, 0, 0, 1)).max() > 1e-4:
        raise SceneError(f"{path}: extrinsics must hold at least one pose with last row 0, 0, 0, 1")
    with as_scene_error(SceneError, name=f"{path}: extrinsics"):
        world_to_camera = nearest_rigid(extrinsics[:, :3])
    coords = numbers(path, arrays, "coords", (frames, None, 3), finite=False)
    count = coords.shape[1]
    visible = arrays.get("visibs", np.zeros(0))
    if visible.dtype.kind not in "bfiu" or visible.shape not in ((frames, count), (frames, count, 1)):
        raise SceneError(f"{path}: visibs is {visible.dtype}{list(visible.shape)}, expected [{frames}, {count}]")
    if not ((visible >= 0) & (visible <= 1)).all():  # False for NaN
        raise SceneError(f"{path}: visibs must be bool or probabilities within [0, 1]")
    visible = visible.reshape(frames, count).astype(np.float64) > 0.5
    coords = keep_visible(path, "coords", coords, visible)
    intrinsics = numbers(path, arrays, "intrinsics", (frames, 3, 3))
    return SpatialTracks(path, coords.swapaxes(0, 1), world_to_camera, intrinsics)


def read_moge(path: str | Path) -> np.ndarray:
    """Read MoGe-2's depth of one picture, f64[H, W] camera z in metres, NaN outside its mask.

    Raises:
      SceneError: as `read_spatialtracker`.
    """
    path = str(path)
    arrays = read_npz(path)
    depth = numbers(path, arrays, "depth", (None, None), finite=False)
    mask = arrays.get("mask", np.zeros(0))
    if mask.shape != depth.shape or mask.dtype.kind not in "biu" or not depth.size:
        raise SceneError(f"{path}: mask must be bool of depth's size {list(depth.shape)}, not empty")
    depth = keep_visible(path, "depth", depth, mask.astype(bool))
    if (depth <= 0).any():  # False for NaN
        raise SceneError(f"{path}: depth must be above 0 within the mask")
    k = numbers(path, arrays, "intrinsics", (3, 3))
    if not (0 < k[0, 0] < 20 and 0 < k[1, 1] < 20 and -1 < k[0, 2] < 2 and -1 < k[1, 2] < 2):
        raise SceneError(f"{path}: intrinsics must be normalised by the picture's width and height")
    return depth


def metric_scale(spatial: SpatialTracks, depths: Mapping[int, np.ndarray], image_size: tuple[int, int]) -> MetricScale:
    """Measure metres per unit of the tracker: median over visible points of MoGe's depth over the tracker's.

    Args:
      depths: f64[H, W] per frame number; a few frames are enough.
      image_size: (height, width) of the tracker's frames; MoGe's may be larger or smaller.

    Raises:
      SceneError: a frame number outside the clip, or fewer than 30 points have both depths.
    """
    pixels, z = project(spatial.tracks, spatial.world_to_camera, spatial.intrinsics)
    ratios = []
    for frame, depth in depths.items():
        if not 0 <= frame < z.shape[1]:
            raise SceneError(f"MoGe depth of frame {frame}: {spatial.path} has frames 0 to {z.shape[1] - 1}")
        height, width = depth.shape
        x = pixels[:, frame, 0] * (width / image_size[1])
        y = pixels[:, frame, 1] * (height / image_size[0])
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # False for NaN
        found = depth[y[inside].astype(np.int64), x[inside].astype(np.int64)] / z[inside, frame]
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
    scale: MetricScale,
    max_spread: float = MAX_SPREAD,
) -> tuple[Scene, np.ndarray]:
    """Make the scene and its tracks f64[N, T, 3], both times the metric factor.

    The scale flag is "metric" only where the spread of the factor is at most `max_spread`; otherwise "relative".

    Args:
      image_size: (height, width) of the frames the tracker was given.
      timestamps: f64[T] seconds.

    Raises:
      SceneError: something does not fit.
    """
    poses = spatial.world_to_camera.copy()
    poses[:, :, 3] *= scale.factor
    scene = Scene(
        clip_id=clip_id,
        source_id=source_id,
        world_to_camera=poses,
        intrinsics=spatial.intrinsics,
        image_size=image_size,
        timestamps=timestamps,
        objects=(),
        scale="metric" if scale.spread <= max_spread else "relative",
        provenance={
            "tool": "spatialtrackerv2+moge2",
            "files": [Path(spatial.path).name],
            "parameters": {"max_spread": max_spread},
            "quality": dataclasses.asdict(scale),
        },
    )
    return scene, spatial.tracks * scale.factor


@dataclasses.dataclass(frozen=True)
class MonocularSource:
    """Clips with one view.

    Attributes:
      root: where the clips' files are.
      max_spread: the scale is trusted up to this spread, see `monocular_scene`.
      pool: reads the videos' headers under a time limit.
    """

    root: Path
    max_spread: float = MAX_SPREAD
    pool: DecodePool = dataclasses.field(default_factory=DecodePool)

    def clip_ids(self) -> list[str]:
        return sorted(p.name.removesuffix(_TRACKER) for p in self.root.glob(f"*{_TRACKER}"))

    def load(self, clip_id: str) -> LoadedClip:
        names = [(".mp4",), (_TRACKER,), ("-moge",), MASKS, CAPTIONS]
        video, tracker, moge, masks, captions = find(self.root, clip_id, names)
        card = read_card(self.root / f"{clip_id}-clip.json", clip_id)
        spatial = read_spatialtracker(tracker)
        count = len(spatial.world_to_camera)
        with as_scene_error(MediaError):
            info = self.pool.probe(str(video))
        if info.frames != count:
            raise SceneError(f"{video} has {info.frames} frames, {tracker.name} {count}: track every frame")
        size = card.frame_size or (info.height, info.width)
        # A tracker that was given smaller frames has a principal point far from the middle of the video's.
        middle = np.array([size[1], size[0]]) / 2
        if (np.abs(spatial.intrinsics[:, :2, 2] - middle) > 2 * _OFF_CENTRE * middle).any():
            raise SceneError(
                f"{tracker}: its principal point {np.round(spatial.intrinsics[0, :2, 2], 1).tolist()} is not near the "
                f"middle of a {size[0]} x {size[1]} frame; if the tracker was given frames of another size, say so in "
                "frame_size of <clip>-clip.json"
            )
        scene, tracks = monocular_scene(
            spatial,
            size,
            info.times,
            clip_id=clip_id,
            source_id=card.source_id,
            scale=metric_scale(spatial, _depths(moge), size),
            max_spread=self.max_spread,
        )
        scene, left_out = with_objects(scene, tracks, masks, captions)
        return LoadedClip(scene, video, left_out)


def _depths(folder: Path) -> dict[int, np.ndarray]:
    files = sorted(folder.glob("*.npz"))
    wrong = [file for file in files if not file.stem.isascii() or not file.stem.isdigit()]
    if wrong or not files:
        raise SceneError(f"{wrong[0] if wrong else folder}: MoGe files are named by their frame's number: 000012.npz")
    return {int(file.stem): read_moge(file) for file in files}
