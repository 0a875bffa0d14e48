"""Frames of a clip in and out of files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from data_prep.store.untrusted import SceneError, as_scene_error
from mllm4d_jax.files.atomic import replacing
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.images import read_image
from mllm4d_jax.media.video import VideoClip
from mllm4d_jax.media.written import require_frames
from mllm4d_jax.qa.errors import MediaError

CODECS = {"ffv1": "FFV1", "mpeg4": "mp4v"}  # lossless; small but lossy
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_all_frames(path: str | Path, pool: DecodePool, max_frames: int) -> VideoClip:
    """Read every frame of a video, u8[T,H,W,3] RGB, decoded under the pool's time limit.

    Args:
      max_frames: a longer clip is refused before it is decoded (all of it would be in memory at once).

    Raises:
      SceneError: unreadable, damaged, or longer than that.
    """
    with as_scene_error(MediaError):
        count = pool.probe(str(path)).frames
        if count > max_frames:
            raise SceneError(f"{path} has {count} frames, more than {max_frames}: cut it into clips first")
        return pool.read(str(path), SampleRule("uniform", max_frames, None))


def read_folder(path: str | Path) -> np.ndarray:
    """Read a folder of images, ordered by the numbers in their names: u8[T,H,W,3] RGB.

    Raises:
      SceneError: no images, an unreadable one, or sizes that differ.
    """
    with as_scene_error(MediaError):
        images = [read_image(str(file)) for file in _frame_files(path)]
    if not images:
        raise SceneError(f"{path} holds no images")
    if len({image.shape for image in images}) > 1:
        raise SceneError(f"{path}: its images differ in size")
    return np.stack(images)


def frames_size(path: str | Path, frames: int, pool: DecodePool) -> tuple[int, int]:
    """Return (height, width) of a video or a folder of images, and check that it has `frames` frames.

    A video is not decoded for it (but for its first frame): its packets tell.

    Raises:
      SceneError: missing, unreadable, or of another length.
    """
    path = Path(path)
    with as_scene_error(MediaError):
        if path.is_dir():
            files = _frame_files(path)
            found, size = len(files), read_image(str(files[0])).shape[:2] if files else (0, 0)
        else:
            info = pool.probe(str(path))
            found, size = info.frames, (info.height, info.width)
    if found != frames:
        raise SceneError(f"{path} has {found} frames, its annotations {frames}; are they of the same clip?")
    return int(size[0]), int(size[1])


def _frame_files(folder: str | Path) -> list[Path]:
    """The image files of a folder, ordered by the last number in their names. Raises SceneError: none or a double."""
    numbers: dict[int, Path] = {}
    for file in (p for p in Path(folder).iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES):
        digits = "".join(c if c in "0123456789" else " " for c in file.stem).split()
        if not digits or len(digits[-1]) > 18 or int(digits[-1]) in numbers:
            raise SceneError(f"{file}: frames are ordered by the last number in their names; it has none or a double")
        numbers[int(digits[-1])] = file
    return [numbers[n] for n in sorted(numbers)]


def write_video(path: str | Path, frames: np.ndarray, fps: float, codec: str) -> None:
    """Write u8[T,H,W,3] RGB frames; the file is there whole or not at all.

    Args:
      codec: key of `CODECS`.

    Raises:
      SceneError: unknown codec, or this OpenCV cannot write it. StorageError: the disk is full.
    """
    path = Path(path)
    if codec not in CODECS:
        raise SceneError(f"codec {codec!r} unknown; there are {', '.join(CODECS)}")
    size = (frames.shape[2], frames.shape[1])
    with replacing(path, path.suffix) as partial:
        writer = cv2.VideoWriter(str(partial), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*CODECS[codec]), fps, size)
        if not writer.isOpened():
            raise SceneError(f"{path}: this OpenCV cannot write {codec} video; try the other of {[*CODECS]}")
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()
        require_frames(partial, len(frames))


def encode_jpeg(frame: np.ndarray, quality: int = 95) -> bytes:
    """Encode a frame u8[H, W, 3] RGB as a JPEG file; `quality` 1-100. Raises ValueError for anything else."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size or not 1 <= quality <= 100:
        raise ValueError(f"cannot encode {frame.dtype}{list(frame.shape)} as JPEG of quality {quality}")
    ok, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ValueError(f"a frame of shape {list(frame.shape)} cannot be encoded as JPEG")
    return data.tobytes()
