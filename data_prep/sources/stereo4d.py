"""Reader of Stereo4D's annotation files (arXiv 2412.09621; one npz per clip) with their rectified frames."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import SceneError
from data_prep.scenes.scene import Scene, SceneObject, intrinsics_of, nearest_rigid
from data_prep.store.npz import read_npz
from mllm4d_jax.media.video import probe, read_image
from mllm4d_jax.qa.errors import MediaError

FOV = 60.0  # degrees across, of the released rectified frames
BASELINE = 0.063  # metres, assumed by the authors for every camera
MAX_FRAMES = 10_000
MAX_TRACK_BYTES = 2**31  # of the dense tracks, float64[N, T, 3]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
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
      rectified_to_rig: f64[2, 3, 3], left and right eye.
      fov_bounds: f64[4] degrees of the VR180 frame: start and end yaw, start and end tilt.
      tracks: f64[N, T, 3] world metres, NaN = not visible.
    """

    path: str
    name: str
    video_id: str
    timestamps: np.ndarray
    camera_to_world: np.ndarray
    rectified_to_rig: np.ndarray
    fov_bounds: np.ndarray
    tracks: np.ndarray

    def scene(
        self,
        image_size: tuple[int, int],
        *,
        fov: float = FOV,
        scale: str = "assumed_baseline",
        objects: tuple[SceneObject, ...] = (),
        quality: dict[str, Any] | None = None,
    ) -> Scene:
        """The clip's scene.

        Args:
          image_size: (height, width) of the rectified frames (`frames_size`).
          fov: their horizontal field of view, degrees.
          scale: how far the metres can be trusted. Stereo4D assumes one baseline for every camera, so the default is
            "assumed_baseline"; give "metric" or "relative" for a clip that has been checked.
          quality: figures for the provenance.

        Raises:
          SceneError: something does not fit.
        """
        return Scene.from_camera_to_world(
            clip_id=self.name,
            source_id=self.video_id,
            camera_to_world=self.camera_to_world,
            intrinsics=np.repeat(intrinsics_of(image_size, fov)[None], len(self.timestamps), axis=0),
            image_size=image_size,
            timestamps=self.timestamps,
            objects=objects,
            scale=scale,
            provenance={
                "tool": "stereo4d",
                "files": [Path(self.path).name],
                "parameters": {"fov": fov, "baseline": BASELINE},
                "quality": quality or {},
            },
        )


def read_stereo4d(path: str | Path) -> Stereo4DClip:
    """Reads one annotation file.

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
    timestamps = _timestamps(path, arrays["timestamps"])
    count = len(timestamps)
    poses = _numbers(path, "camera2world", arrays["camera2world"], (count, 3, 4))
    try:
        poses = nearest_rigid(poses)
    except SceneError as error:
        raise SceneError(f"{path}: camera2world: {error}") from error
    rig = _numbers(path, "rectified2rig", arrays["rectified2rig"], (2, 3, 3))
    if np.abs(rig @ rig.swapaxes(1, 2) - np.eye(3)).max() > 1e-3 or (np.linalg.det(rig) < 0).any():
        raise SceneError(f"{path}: rectified2rig must hold two rotations")
    return Stereo4DClip(
        path=path,
        name=_text(path, "name", arrays["name"]),
        video_id=_text(path, "video_id", arrays["video_id"]),
        timestamps=timestamps / 1e6,
        camera_to_world=poses,
        rectified_to_rig=rig,
        fov_bounds=_numbers(path, "fov_bounds", arrays["fov_bounds"], (4,)),
        tracks=_scatter(path, count, *(arrays[key] for key in _TRACK_KEYS)),
    )


def frames_size(path: str | Path, frames: int) -> tuple[int, int]:
    """(height, width) of the rectified frames, a video or a folder of images; checks that there are `frames` of them.

    For a video the promised number counts; only decoding it tells the truth.

    Raises:
      SceneError: missing, unreadable, or of another length than the annotations.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = frame_files(path)
            found = len(files)
            size = read_image(str(files[0])).shape[:2] if files else (0, 0)
        else:
            info = probe(str(path))
            found, size = info.frames, (info.height, info.width)
    except MediaError as error:
        raise SceneError(str(error)) from error
    if found is not None and found != frames:
        raise SceneError(f"{path} has {found} frames, its annotations {frames}; are they of the same clip?")
    return int(size[0]), int(size[1])


def frame_files(folder: str | Path) -> list[Path]:
    """The image files of a folder of frames, in the order of the numbers in their names.

    Raises:
      SceneError: two names have the same number, or one has none.
    """
    files = [p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
    numbers: dict[int, Path] = {}
    for file in files:
        digits = "".join(c if c in "0123456789" else " " for c in file.stem).split()
        if not digits or len(digits[-1]) > 18 or int(digits[-1]) in numbers:
            raise SceneError(
                f"{file}: frames are ordered by the last number in their names; this one has none or a double"
            )
        numbers[int(digits[-1])] = file
    return [numbers[n] for n in sorted(numbers)]


def _numbers(path: str, key: str, array: np.ndarray, shape: tuple[int | None, ...], kinds: str = "fiu") -> np.ndarray:
    """f64 copy of a finite array of `shape` (None = any)."""
    fits = array.ndim == len(shape) and all(w is None or n == w for n, w in zip(array.shape, shape, strict=True))
    if array.dtype.kind not in kinds or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise SceneError(f"{path}: {key} is {array.dtype}{list(array.shape)}, expected numbers [{wanted}]")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise SceneError(f"{path}: {key} holds NaN or infinite values")
    return array


def _timestamps(path: str, array: np.ndarray) -> np.ndarray:
    """f64[T] microseconds."""
    timestamps = _numbers(path, "timestamps", array, (None,))
    if not 1 <= len(timestamps) <= MAX_FRAMES:
        raise SceneError(f"{path}: timestamps has {len(timestamps)} frames; expected 1 to {MAX_FRAMES}")
    if (np.diff(timestamps) <= 0).any():
        raise SceneError(f"{path}: timestamps must increase (microseconds)")
    return timestamps


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


def _scatter(path: str, frames: int, lengths: np.ndarray, indices: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Ragged tracks to f64[N, frames, 3] with NaN where a track has no point."""
    lengths = _numbers(path, "track_lengths", lengths, (None,), "iu")
    total = len(indices) if indices.ndim == 1 else -1
    indices = _numbers(path, "track_indices", indices, (None,), "iu")
    if (lengths < 0).any() or (lengths > frames).any():
        raise SceneError(f"{path}: track_lengths must be within [0, {frames}], the number of frames")
    lengths = lengths.astype(np.int64)
    if int(lengths.sum()) != total:
        raise SceneError(f"{path}: track_lengths add up to {int(lengths.sum())}, track_indices has {total} entries")
    coordinates = _numbers(path, "track_coordinates", coordinates, (total, 3))
    if ((indices < 0) | (indices >= frames)).any():
        raise SceneError(f"{path}: track_indices must be within [0, {frames - 1}], the frame numbers")
    indices = indices.astype(np.int64)
    need = len(lengths) * frames * 3 * 8
    if need > MAX_TRACK_BYTES:
        raise SceneError(
            f"{path}: {len(lengths)} tracks over {frames} frames need {need} bytes, over {MAX_TRACK_BYTES}"
        )
    cell = np.repeat(np.arange(len(lengths)), lengths) * frames + indices
    if len(np.unique(cell)) != total:
        raise SceneError(f"{path}: track_indices names a frame twice within one track")
    tracks = np.full((len(lengths) * frames, 3), np.nan)
    tracks[cell] = coordinates
    return tracks.reshape(len(lengths), frames, 3)
