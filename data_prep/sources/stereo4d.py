"""The `stereo4d` source: Stereo4D's annotations (arXiv 2412.09621; one npz per clip) with their rectified frames.

`synthetic` is made of rendered clips in the same layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.scenes.scene import Scene, intrinsics_of, nearest_rigid
from data_prep.sources.base import LoadedClip, object_files, with_objects
from data_prep.sources.frames import probe_frames, read_folder, write_video, written_times
from data_prep.sources.layout import LEFT, LEFT_EYE, SIDECARS, clip_groups, clip_stems, find
from data_prep.stereo.stage import STEREO4D_BASELINE
from data_prep.store.untrusted import SceneError, as_scene_error, numbers, read_npz
from data_prep.synthetic.clip import make_clip, write_clip
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.media.decode_pool import DecodePool

FOV = 60.0  # degrees across, of the released rectified frames
MAX_FRAMES = 10_000
MAX_TRACK_BYTES = 2**31  # of the dense tracks, float64[N, T, 3]
_KEYS = ("name", "video_id", "timestamps", "camera2world", "rectified2rig", "fov_bounds")
_TRACK_KEYS = ("track_lengths", "track_indices", "track_coordinates")


@dataclasses.dataclass(frozen=True, eq=False)
class Stereo4DClip:
    """One annotation file, checked and unpacked.

    Attributes:
      path: of the file.
      name, video_id: of the clip and its YouTube video.
      timestamps: f64[T] seconds, strictly increasing.
      camera_to_world: f64[T, 3, 4] of the rectified left camera, OpenCV axes.
      tracks: f64[N, T, 3] world metres, NaN = not visible.
    """

    path: str
    name: str
    video_id: str
    timestamps: np.ndarray
    camera_to_world: np.ndarray
    tracks: np.ndarray

    def scene(self, image_size: tuple[int, int], scale: str) -> Scene:
        """Make the clip's scene, without objects.

        Args:
          image_size: (height, width) of the rectified frames (`frames_size`).
          scale: how far the metres can be trusted, see `scene.SCALES`.

        Raises:
          SceneError: something does not fit.
        """
        return Scene(
            clip_id=self.name,
            source_id=self.video_id,
            camera_to_world=self.camera_to_world,
            intrinsics=np.repeat(intrinsics_of(image_size, FOV)[None], len(self.timestamps), axis=0),
            image_size=image_size,
            timestamps=self.timestamps,
            objects=(),
            scale=scale,
            provenance={
                "tool": "stereo4d",
                "files": [Path(self.path).name],
                "parameters": {"fov": FOV, "baseline": STEREO4D_BASELINE},
                "quality": {},
            },
        )


def read_stereo4d(path: str | Path) -> Stereo4DClip:
    """Read one annotation file.

    Poses are stored with few digits; their 3x3 part is replaced by the nearest rotation where it is within 1e-3 of one.

    Raises:
      SceneError: missing, damaged, too large, or a key is missing, has another shape or type, or values that cannot be;
        naming file and key.
    """
    path = str(path)
    arrays = read_npz(path)
    missing = [key for key in (*_KEYS, *_TRACK_KEYS) if key not in arrays]
    if missing:
        raise SceneError(f"{path}: no {', '.join(missing)}; not a Stereo4D annotation file")
    timestamps = numbers(path, arrays, "timestamps", (None,))  # microseconds
    count = len(timestamps)
    if not 1 <= count <= MAX_FRAMES:
        raise SceneError(f"{path}: timestamps has {count} frames; expected 1 to {MAX_FRAMES}")
    if (np.diff(timestamps) <= 0).any():
        raise SceneError(f"{path}: timestamps must increase (microseconds)")
    poses = numbers(path, arrays, "camera2world", (count, 3, 4))
    with as_scene_error(SceneError, name=f"{path}: camera2world"):
        poses = nearest_rigid(poses)
    rig = numbers(path, arrays, "rectified2rig", (2, 3, 3))
    if np.abs(rig @ rig.swapaxes(1, 2) - np.eye(3)).max() > 1e-3 or (np.linalg.det(rig) < 0).any():
        raise SceneError(f"{path}: rectified2rig must hold two rotations")
    numbers(path, arrays, "fov_bounds", (4,))
    return Stereo4DClip(
        path=path,
        name=_text(path, "name", arrays["name"]),
        video_id=_text(path, "video_id", arrays["video_id"]),
        timestamps=timestamps / 1e6,
        camera_to_world=poses,
        tracks=_scatter(path, count, arrays),
    )


def _text(path: str, key: str, array: np.ndarray) -> str:
    """A scalar string; bytes are UTF-8."""
    if array.dtype.kind not in "US" or array.size != 1:
        raise SceneError(f"{path}: {key} is {array.dtype}{list(array.shape)}, expected one string")
    value = array.reshape(())[()]
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
        text.encode("utf-8")
    except UnicodeError as error:
        raise SceneError(f"{path}: {key} is not text: {error}") from error
    if not text.strip() or len(text) > 256:
        raise SceneError(f"{path}: {key} must have 1 to 256 characters")
    return text


def _scatter(path: str, frames: int, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Ragged tracks to f64[N, frames, 3] with NaN where a track has no point."""
    lengths, indices = (numbers(path, arrays, key, (None,), kinds="iu") for key in _TRACK_KEYS[:2])
    total = len(indices)
    if (lengths < 0).any() or (lengths > frames).any():
        raise SceneError(f"{path}: track_lengths must be within [0, {frames}], the number of frames")
    lengths = lengths.astype(np.int64)
    if int(lengths.sum()) != total:
        raise SceneError(f"{path}: track_lengths add up to {int(lengths.sum())}, track_indices has {total} entries")
    coordinates = numbers(path, arrays, "track_coordinates", (total, 3))
    if ((indices < 0) | (indices >= frames)).any():
        raise SceneError(f"{path}: track_indices must be within [0, {frames - 1}], the frame numbers")
    indices = indices.astype(np.int64)
    need = len(lengths) * frames * 3 * 8
    if need > MAX_TRACK_BYTES:
        raise SceneError(f"{path}: {len(lengths)} tracks over {frames} frames need {need} > {MAX_TRACK_BYTES} bytes")
    cell = np.repeat(np.arange(len(lengths)), lengths) * frames + indices
    marked = np.zeros(len(lengths) * frames, bool)
    marked[cell] = True
    if np.count_nonzero(marked) != total:
        raise SceneError(f"{path}: track_indices names a frame twice within one track")
    tracks = np.full((len(lengths) * frames, 3), np.nan)
    tracks[cell] = coordinates
    return tracks.reshape(len(lengths), frames, 3)


@dataclasses.dataclass(frozen=True)
class Stereo4DSource:
    """Stereo4D clips: `<clip>.npz`, `<clip>-left_rectified.mp4` or a folder `<clip>-left_rectified` of images.

    Attributes:
      folder: where the clips' files are, see `layout`.
      root: see `ClipSource`; `folder` itself unless the frames are images.
      scale: how far their metres can be trusted, see `scene.SCALES`; Stereo4D assumes one baseline for every camera.
      pool: opens videos under a time limit.
      groups: of `layout.clip_groups`; None = found now.
    """

    folder: Path
    root: Path
    scale: str = "assumed_baseline"
    pool: DecodePool = dataclasses.field(default_factory=DecodePool)
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.groups is None:
            object.__setattr__(self, "groups", clip_groups(self.folder, (".npz",)))

    def clip_ids(self) -> list[str]:
        return [stem for stem in clip_stems(self.folder, (".npz",)) if not stem.endswith(SIDECARS)]

    def load(self, clip_id: str) -> LoadedClip:
        names = [(".npz",), LEFT + LEFT_EYE]
        wanted = LEFT if self.root == self.folder else LEFT_EYE
        if find(self.folder, clip_id, [wanted], self.groups, optional=True):
            names[1] = wanted  # where a clip has both a video and images, the run says which
        annotations, frames = find(self.folder, clip_id, names, self.groups)
        objects = object_files(self.folder, clip_id, self.groups)
        clip = read_stereo4d(annotations)
        size, times = probe_frames(frames, len(clip.timestamps), self.pool)
        if times is None:  # images become a video
            times = written_times(clip.timestamps)
        # The model sees the frames of the video, chosen by its times. A clip is known by its files' name: two may be
        # copies of one, which have the same name inside.
        scene = dataclasses.replace(clip.scene(size, self.scale), timestamps=times, clip_id=clip_id)
        scene, left_out = with_objects(scene, clip.tracks, objects)
        return LoadedClip(scene, self._video(clip_id, frames, scene), left_out)

    def _video(self, clip_id: str, frames: Path, scene: Scene) -> Path:
        """`frames` if it is a video; images become one below the media root."""
        if frames.is_file():
            if self.root != self.folder:
                raise SceneError(f"{frames} is a video, but this run reads frames from folders (stereo4d.frames)")
            return frames
        if self.root == self.folder:
            raise SceneError(f"{frames} is a folder of images: set stereo4d.frames=images to write a video of them")
        video = self.root / f"{clip_id}.mp4"
        if not video.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            write_video(video, read_folder(frames), scene.timestamps, "mpeg4")
        return video


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Rendered clips, written in Stereo4D's layout and read back by its reader.

    Attributes:
      root: media root; the clips are written into its folder `clips`.
      config: what they look like.
      seed, count: clip n of `count` follows from (seed, n, config).
      pool: as in `Stereo4DSource`.
    """

    root: Path
    config: SyntheticConfig
    seed: int
    count: int
    pool: DecodePool = dataclasses.field(default_factory=DecodePool)

    def clip_ids(self) -> list[str]:
        return [f"synthetic-{self.seed}-{n:06d}" for n in range(self.count)]

    def load(self, clip_id: str) -> LoadedClip:
        made, folder = make_clip(self.seed, int(clip_id.rpartition("-")[2]), self.config), self.root / "clips"
        write_clip(made, folder, codec="mpeg4")
        return Stereo4DSource(folder, folder, "metric", self.pool, groups=("",)).load(made.scene.clip_id)
