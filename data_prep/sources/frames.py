"""Frames of a clip in and out of files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from data_prep.store.untrusted import SceneError, as_scene_error
from mllm4d_jax.files.atomic import replacing
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.images import read_image
from mllm4d_jax.media.video import VideoClip
from mllm4d_jax.qa.errors import MediaError

CODECS = {"ffv1": "bgr0", "mpeg4": "yuv420p"}  # lossless; small but lossy: each with the pixels that it stores
_TICK = Fraction(1, 60_000)  # MPEG-4 counts at most 65,535 a second
_BITS = 4  # of a pixel, for lossy video
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


def probe_frames(path: str | Path, frames: int, pool: DecodePool) -> tuple[tuple[int, int], np.ndarray | None]:
    """Return (height, width) of a video or a folder of images, and check that it has `frames` frames.

    A video is not decoded for it (but for its first frame): its packets tell. They tell too when its frames show: the
    second result, f64[T] seconds; images do not, None.

    Raises:
      SceneError: missing, unreadable, or of another length.
    """
    path = Path(path)
    with as_scene_error(MediaError):
        if path.is_dir():
            files = _frame_files(path)
            found, size, times = len(files), read_image(str(files[0])).shape[:2] if files else (0, 0), None
        else:
            info = pool.probe(str(path))
            found, size, times = info.frames, (info.height, info.width), info.times
    if found != frames:
        raise SceneError(f"{path} has {found} frames, its annotations {frames}; are they of the same clip?")
    return (int(size[0]), int(size[1])), times


def _frame_files(folder: str | Path) -> list[Path]:
    """The image files of a folder, ordered by the last number in their names. Raises SceneError: none or a double."""
    numbers: dict[int, Path] = {}
    for file in (p for p in Path(folder).iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES):
        digits = "".join(c if c in "0123456789" else " " for c in file.stem).split()
        if not digits or len(digits[-1]) > 18 or int(digits[-1]) in numbers:
            raise SceneError(f"{file}: frames are ordered by the last number in their names; it has none or a double")
        numbers[int(digits[-1])] = file
    return [numbers[n] for n in sorted(numbers)]


def write_video(path: str | Path, frames: np.ndarray, times: np.ndarray, codec: str) -> None:
    """Write frames u8[T,H,W,3] RGB that show at `times`; the file is there whole or not at all.

    Args:
      times: f64[T] seconds, ascending; written as `written_times`.
      codec: key of `CODECS`.

    Raises:
      SceneError: unknown codec, frames closer than 1/60,000 s, or FFmpeg cannot write them. StorageError: the disk is
        full.
    """
    path = Path(path)
    if codec not in CODECS:
        raise SceneError(f"codec {codec!r} unknown; there are {', '.join(CODECS)}")
    moments = _ticks(times)
    if len(moments) != len(frames) or (np.diff(moments) <= 0).any():
        raise SceneError(f"{path}: {len(frames)} frames cannot be written at {len(moments)} times that do not ascend")
    rate = Fraction(len(moments) - 1, max(1, int(moments[-1]))) / _TICK if len(moments) > 1 else Fraction(30)
    try:
        with replacing(path, path.suffix) as partial, av.open(str(partial), "w") as file:
            stream = file.add_stream(codec, rate=rate.limit_denominator(10_000), bit_rate=_bits(frames, rate))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = CODECS[codec]
            stream.time_base = stream.codec_context.time_base = _TICK
            for image, moment in zip(frames, moments.tolist(), strict=True):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = moment, _TICK
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise SceneError(f"{path}: FFmpeg cannot write {codec} video of {frames.shape} ({error})") from error


def written_times(times: np.ndarray) -> np.ndarray:
    """Return when frames that show at f64[T] seconds show in a video by `write_video`: from 0 on, in 1/60,000 s."""
    return np.array([float(moment * _TICK) for moment in _ticks(times).tolist()])


def _ticks(times: np.ndarray) -> np.ndarray:
    return np.round((np.asarray(times, np.float64) - times[0]) / float(_TICK)).astype(np.int64)


def _bits(frames: np.ndarray, rate: Fraction) -> int:
    """Bits per second, as many as an encoder counts at most."""
    return int(min(_BITS * frames.shape[1] * frames.shape[2] * rate, 2**31 - 1))


def encode_jpeg(frame: np.ndarray, quality: int = 95) -> bytes:
    """Encode a frame u8[H, W, 3] RGB as a JPEG file; `quality` 1-100. Raises ValueError for anything else."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size or not 1 <= quality <= 100:
        raise ValueError(f"cannot encode {frame.dtype}{list(frame.shape)} as JPEG of quality {quality}")
    ok, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ValueError(f"a frame of shape {list(frame.shape)} cannot be encoded as JPEG")
    return data.tobytes()
