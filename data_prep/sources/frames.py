"""All frames of a clip in and out of files, for the stages that look at pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from data_prep.errors import SceneError
from data_prep.sources.stereo4d import frame_files
from mllm4d_jax.files.atomic import replacing
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.video import VideoClip, read_image
from mllm4d_jax.qa.errors import MediaError

CODECS = {"ffv1": "FFV1", "mpeg4": "mp4v"}  # lossless; small but lossy


def read_all_frames(path: str | Path, pool: DecodePool, max_frames: int) -> VideoClip:
    """Every frame of a video, u8[T,H,W,3] RGB, decoded under the pool's time limit.

    Args:
      max_frames: a longer clip is refused before it is decoded (all of it would be in memory at once).

    Raises:
      SceneError: unreadable, damaged, or longer than that.
    """
    try:
        promised = pool.probe(str(path)).frames
        if promised is not None and promised > max_frames:
            raise SceneError(f"{path} has {promised} frames, more than {max_frames}: cut it into clips first")
        clip = pool.read(str(path), SampleRule("uniform", max_frames, None))
    except MediaError as error:
        raise SceneError(str(error)) from error
    if clip.total_frames > len(clip.frames):
        raise SceneError(f"{path} has {clip.total_frames} frames, more than {max_frames}: cut it into clips first")
    return clip


def read_folder(path: str | Path) -> np.ndarray:
    """u8[T,H,W,3] RGB of a folder of images, ordered by the numbers in their names.

    Raises:
      SceneError: no images, an unreadable one, or sizes that differ.
    """
    try:
        images = [read_image(str(file)) for file in frame_files(path)]
    except MediaError as error:
        raise SceneError(str(error)) from error
    if not images:
        raise SceneError(f"{path} holds no images")
    if len({image.shape for image in images}) > 1:
        raise SceneError(f"{path}: its images differ in size")
    return np.stack(images)


def write_video(path: str | Path, frames: np.ndarray, fps: float, codec: str) -> None:
    """Writes u8[T,H,W,3] RGB frames; the file is there whole or not at all.

    Args:
      codec: key of `CODECS`.

    Raises:
      SceneError: unknown codec, or this OpenCV cannot write it.
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
