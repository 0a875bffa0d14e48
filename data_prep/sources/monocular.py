"""The `monocular` source (the paper's ablation): what SpatialTrackerV2 and MoGe-2 left beside each video.

`<clip>.mp4`, `<clip>-spatialtracker.npz` (or `<clip>_result.npz`, as its demo calls it), and a folder `<clip>-moge`
with one entry per frame that was measured, named by its number: "000012.npz", or a folder "000012". If the tracker
was given frames of another size than the video's, `<clip>-clip.json` says so (`frame_size`); where the demo stored the
frames (`video`), its file says so itself. Masks have that size too.

SpatialTrackerV2 leaves an npz with time first: `coords` [T, N, 3] world, `extrinsics` [T, 4, 4] world->camera,
`intrinsics` [T, 3, 3] pixels, `visibs` [T, N]. MoGe-2's Python interface gives, per picture, `depth` [H, W] metres,
`mask` [H, W], `intrinsics` [3, 3] normalised by the picture's sides; its command line (`moge infer --maps`) leaves a
folder per picture with `depth.exr`, `mask.png`, `fov.json` (degrees) and others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data_prep.scenes.objects import project
from data_prep.scenes.scene import Scene, nearest_rigid
from data_prep.sources.base import ClipCard, LoadedClip, card_of, object_files, with_objects
from data_prep.sources.exr import read_exr
from data_prep.sources.layout import VIDEOS, clip_groups, clip_stems, find
from data_prep.store.untrusted import SceneError, as_scene_error, keep_visible, numbers, read_json, read_npz
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.images import read_image
from mllm4d_jax.qa.errors import MediaError

MAX_SPREAD = 0.1
_MIN_RATIOS = 30
_TRACKER = ("-spatialtracker.npz", "_result.npz")  # the second as its demo (inference.py) names it
_OFF_CENTRE = 0.1  # share of the side by which a principal point may lie off the middle


@dataclasses.dataclass(frozen=True, eq=False)
class SpatialTracks:
    """What SpatialTrackerV2 says of a clip, in its own unit of length.

    Attributes:
      path: of the file.
      tracks: f64[N, T, 3] world, NaN = not visible.
      world_to_camera: f64[T, 3, 4].
      intrinsics: f64[T, 3, 3] pixels of the frames the tool was given.
      frame_size: (height, width) of those frames; None where the file has no `video`.
    """

    path: str
    tracks: np.ndarray
    world_to_camera: np.ndarray
    intrinsics: np.ndarray
    frame_size: tuple[int, int] | None = None


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
    size = None
    if "video" in arrays:  # the demo's: f[T, 3, H, W]
        shape = arrays["video"].shape
        if len(shape) != 4 or shape[:2] != (frames, 3) or not min(shape):
            raise SceneError(f"{path}: video is {list(shape)}, expected the tracker's frames [{frames}, 3, H, W]")
        size = shape[2:]
    return SpatialTracks(path, coords.swapaxes(0, 1), world_to_camera, intrinsics, size)


def read_moge(path: str | Path) -> np.ndarray:
    """Read MoGe-2's depth of one picture, f64[H, W] camera z in metres, NaN outside its mask.

    Args:
      path: an npz of what its Python interface returns, or the folder that its command line left.

    Raises:
      SceneError: as `read_spatialtracker`, or a file of the folder is missing or unreadable.
    """
    path = Path(path)
    arrays = _moge_folder(path) if path.is_dir() else read_npz(path)
    depth = numbers(path, arrays, "depth", (None, None), finite=False)
    mask = arrays.get("mask", np.zeros(0))
    if mask.shape != depth.shape or mask.dtype.kind not in "biu" or not depth.size:
        raise SceneError(f"{path}: mask must be bool of depth's size {list(depth.shape)}, not empty")
    depth = keep_visible(path, "depth", depth, mask.astype(bool))
    if (depth <= 0).any():  # False for NaN
        raise SceneError(f"{path}: depth must be above 0 within the mask")
    if path.is_dir():
        return depth
    k = numbers(path, arrays, "intrinsics", (3, 3))
    if not (0 < k[0, 0] < 20 and 0 < k[1, 1] < 20 and -1 < k[0, 2] < 2 and -1 < k[1, 2] < 2):
        raise SceneError(f"{path}: intrinsics must be normalised by the picture's width and height")
    return depth


def _moge_folder(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of `read_moge` from the files of MoGe's command line (moge/scripts/infer.py)."""
    missing = [name for name in ("depth.exr", "mask.png") if not (folder / name).is_file()]
    if missing:
        raise SceneError(f"{folder} has no {', '.join(missing)}; run MoGe with --maps")
    channels = read_exr(folder / "depth.exr")
    if len(channels) != 1:
        raise SceneError(f"{folder / 'depth.exr'} has the channels {', '.join(channels)}; depth is one")
    with as_scene_error(MediaError):
        mask = read_image(str(folder / "mask.png"))[..., 0] > 0
    fov = read_json(folder / "fov.json") if (folder / "fov.json").exists() else {}
    for name in {"fov_x", "fov_y"} & fov.keys():  # depth is z already: they are only checked
        if type(fov[name]) not in (int, float) or not 0 < fov[name] < 180:
            raise SceneError(f"{folder / 'fov.json'}: {name} must be degrees within (0, 180), not {shown(fov[name])}")
    return {"depth": next(iter(channels.values())), "mask": mask}


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
      root: where the clips' files are, see `layout`.
      max_spread: the scale is trusted up to this spread, see `monocular_scene`.
      pool: reads the videos' headers under a time limit.
      groups: of `layout.clip_groups`; None = found now.
    """

    root: Path
    max_spread: float = MAX_SPREAD
    pool: DecodePool = dataclasses.field(default_factory=DecodePool)
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.groups is None:
            object.__setattr__(self, "groups", clip_groups(self.root, _TRACKER))

    def clip_ids(self) -> list[str]:
        return clip_stems(self.root, _TRACKER)

    def load(self, clip_id: str) -> LoadedClip:
        video, tracker, moge = find(self.root, clip_id, [VIDEOS, _TRACKER, ("-moge",)], self.groups)
        objects = object_files(self.root, clip_id, self.groups)
        card = card_of(self.root, clip_id, self.groups)
        spatial = read_spatialtracker(tracker)
        count = len(spatial.world_to_camera)
        with as_scene_error(MediaError):
            info = self.pool.probe(str(video))
        if info.frames != count:
            raise SceneError(f"{video} has {info.frames} frames, {tracker.name} {count}: track every frame")
        size = _frame_size(spatial, card, (info.height, info.width))
        scene, tracks = monocular_scene(
            spatial,
            size,
            info.times,
            clip_id=clip_id,
            source_id=card.source_id,
            scale=metric_scale(spatial, MogeDepths(moge), size),
            max_spread=self.max_spread,
        )
        scene, left_out = with_objects(scene, tracks, objects)
        return LoadedClip(scene, video, left_out)


def _frame_size(spatial: SpatialTracks, card: ClipCard, video: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the tracker's frames: by the card, by its own file, or those of the video.

    Raises:
      SceneError: card and file differ, or the intrinsics are of frames of another size.
    """
    if card.frame_size and spatial.frame_size not in (None, card.frame_size):
        raise SceneError(
            f"{spatial.path}: its video has frames of {list(spatial.frame_size)}, <clip>-clip.json says frame_size "
            f"{list(card.frame_size)}"
        )
    size = card.frame_size or spatial.frame_size or video
    # A tracker that was given smaller frames has a principal point far from the middle of the video's.
    middle = np.array([size[1], size[0]]) / 2
    if (np.abs(spatial.intrinsics[:, :2, 2] - middle) > 2 * _OFF_CENTRE * middle).any():
        raise SceneError(
            f"{spatial.path}: its principal point {np.round(spatial.intrinsics[0, :2, 2], 1).tolist()} is not near the "
            f"middle of a {size[0]} x {size[1]} frame; if the tracker was given frames of another size, say so in "
            "frame_size of <clip>-clip.json"
        )
    return size


class MogeDepths(Mapping[int, np.ndarray]):
    """MoGe's depth f64[H, W] per frame number, each read when it is asked for: all together may be gigabytes."""

    def __init__(self, folder: Path) -> None:
        """List what MoGe left in `folder`. Raises SceneError: nothing, or names that are no frame's or the same."""
        self._paths: dict[int, Path] = {}
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in (p for p in entries if p.suffix == ".npz" or p.is_dir()):
            digits = re.findall(r"[0-9]+", path.name.removesuffix(".npz"))
            if len(digits) != 1 or len(digits[0]) > 9:
                raise SceneError(
                    f"{path}: MoGe's files are named by their frame's number, from 0: 000012.npz, or a folder 000012 "
                    "or frame_000012"
                )
            first = self._paths.setdefault(int(digits[0]), path)
            if first != path:
                raise SceneError(f"{first} and {path} are of the same frame: keep one of them")
        if not self._paths:
            raise SceneError(f"{folder} holds no MoGe files: 000012.npz, or a folder 000012 with depth.exr, mask.png")

    def __getitem__(self, frame: int) -> np.ndarray:
        """Read it. Raises SceneError: as `read_moge`."""
        return read_moge(self._paths[frame])

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._paths))

    def __len__(self) -> int:
        return len(self._paths)
