"""Videos, stored frames and images to RGB arrays with OpenCV: front to back, sizes reduced while decoding, no seek.

`probe` and `read_video` run the codec in this process and cannot be interrupted. Use them inside a process that may be
killed; everyone else goes through `decode_pool.DecodePool`, which runs them in such a process.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from contextlib import contextmanager

import cv2
import numpy as np

from mllm4d_jax.media.container import Promise, read_promise
from mllm4d_jax.media.frame_sampling import SampleRule, SamplingError
from mllm4d_jax.media.resize import ResizeRule, SizeError, resize_bicubic
from mllm4d_jax.qa.errors import MediaError

_MAX_FPS = 1000.0  # above this the "rate" is a clock resolution of a file that has no frame rate


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video file says before it is decoded; rotation applied.

    Attributes:
      height, width: pixels.
      fps: frames per second.
      frames: promised frames; None when the file does not say. Only decoding tells the truth.
    """

    height: int
    width: int
    fps: float
    frames: int | None


@dataclasses.dataclass(frozen=True)
class VideoClip:
    """Sampled frames of a video.

    Attributes:
      frames: u8[T, H, W, 3] RGB.
      indices: i64[T], frame numbers in the source, ascending.
      source_fps: frames per second of the source.
      total_frames: frames the source has, counted while decoding.
    """

    frames: np.ndarray
    indices: np.ndarray
    source_fps: float
    total_frames: int


def probe(path: str) -> VideoInfo:
    """Size, rate and promised length of a video, without decoding it.

    Raises:
      MediaError: "missing_file", "empty_file", "truncated_video", "not_a_video", "missing_fps".
    """
    with _open(path) as (_, info, _promise):
        return info


def read_video(path: str, sample: SampleRule, resize: ResizeRule | None = None) -> VideoClip:
    """Decodes a video once from front to back and keeps the sampled frames.

    Every frame is resized as it comes, so memory holds one source frame plus the codec's own and the resized clip: 32
    frames of an 8K video need no more than one of them plus a few MB. The whole file is decoded because its length is
    only known at the end. Where it differs from the promised one, frames are sampled anew from the true length and the
    file is read a second time.

    A file with fewer frames than it promises is an error, with this slack: 2 frames for an MP4/QuickTime file all of
    whose bytes are there (rounding of edit lists; codecs that cannot show the first or last frames of a clip cut
    between key frames), none if bytes are missing; 5 %, at least 2 frames and at most one second, for containers whose
    promise is itself an estimate from the duration, which sound that outlasts the picture prolongs.

    Rotation metadata is applied. Transparency is ignored (the codec interface drops it).

    Args:
      resize: sizes of the kept frames; None keeps the source size.

    Raises:
      MediaError: as `probe`, and "zero_frames", "one_frame", "truncated_video", "too_few_frames", "bad_size",
        "undecodable_frame", "varying_size".
    """
    with _open(path) as (capture, info, promise):
        guess = info.frames
        if guess is None:
            clip, total = None, sum(1 for _ in iter(capture.grab, False))
        else:
            clip, total = _decode(path, capture, info, sample, resize, guess)
        _check_length(path, total, total if guess is None else guess, info, promise)
    if clip is None or total != guess:
        with _open(path) as (capture, info, promise):
            clip, again = _decode(path, capture, info, sample, resize, total)
        if again != total:
            raise MediaError(f"{path}: decoding it twice gave {total} and {again} frames", "truncated_video")
    return clip


def plan_frames(
    name: str, info: VideoInfo, total: int, sample: SampleRule, resize: ResizeRule | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the frames i64[n] that a rule takes of a clip of `total` frames, and their (height, width) when resized.

    Raises:
      MediaError: "too_few_frames", "bad_size"; `name` says of which clip.
    """
    try:
        indices = sample.indices(total, info.fps) if total > 1 else np.zeros(1, np.int64)
        size = (info.height, info.width)
        return indices, size if resize is None else resize.size(len(indices), *size)
    except SamplingError as error:
        raise MediaError(f"{name}: {error}", "too_few_frames") from error
    except SizeError as error:
        raise MediaError(f"{name}: {error}", "bad_size") from error


@contextmanager
def _open(path: str):
    """Yields (capture, VideoInfo, Promise) of an opened video."""
    _check_file(path, "video")
    promise = read_promise(path)
    # The FFmpeg backend by name: others would take the path for a pattern of numbered images.
    one_thread = [cv2.CAP_PROP_N_THREADS, 1]  # each one holds frames of its own in memory
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, one_thread)
    try:
        if not capture.isOpened():
            if not promise.damage:
                raise MediaError(f"{path} is not a video (no decoder recognises it)", "not_a_video")
            message = f"{path} is truncated, none of its frames can be decoded: {promise.damage}"
            raise MediaError(message, "truncated_video")
        size = (int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)))
        if min(size) < 1:  # a decoder took other bytes for its own
            reason = "truncated_video" if promise.damage else "not_a_video"
            raise MediaError(f"{path} is not a video that can be read: {promise.damage or 'no picture size'}", reason)
        fps = capture.get(cv2.CAP_PROP_FPS)
        if not (math.isfinite(fps) and 0 < fps <= _MAX_FPS):
            raise MediaError(
                f"{path} has no usable frame rate ({fps:g}): its frames cannot be dated; re-encode it at a fixed rate",
                "missing_fps",
            )
        declared = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        known = promise.frames or (int(declared) if 0 < declared < 2**53 else None)
        yield capture, VideoInfo(*size, fps, known), promise
    finally:
        capture.release()


def _check_file(path: str, kind: str) -> None:
    if not os.path.exists(path):
        raise MediaError(f"{kind} file {path} does not exist", "missing_file")
    if not os.path.isfile(path):
        raise MediaError(f"{path} is not a regular file", "missing_file")
    if not os.path.getsize(path):
        raise MediaError(f"{kind} file {path} is empty (0 bytes)", "empty_file")


def _check_length(path: str, decoded: int, promised: int, info: VideoInfo, promise: Promise) -> None:
    slack = 0 if promise.damage else 2
    if promise.frames is None:
        slack = min(max(2.0, 0.05 * promised), max(2.0, info.fps))
    if decoded < promised - slack:
        because = f" ({promise.damage})" if promise.damage else ""
        raise MediaError(
            f"{path} is truncated or damaged: {decoded} of {promised} promised frames can be decoded{because}",
            "truncated_video",
        )
    if decoded == 0:
        raise MediaError(f"{path} holds no decodable frame", "zero_frames")
    if decoded == 1:
        raise MediaError(f"{path} has a single frame: give it as an image, not as a video", "one_frame")


def _decode(
    path: str, capture: cv2.VideoCapture, info: VideoInfo, sample: SampleRule, resize: ResizeRule | None, total: int
) -> tuple[VideoClip | None, int]:
    """Reads to the end of the file. Returns (clip of the frames sampled for a length of `total`, frames in the file).

    The clip is None when the file ends before its last sampled frame.
    """
    indices, size = plan_frames(path, info, total, sample, resize)
    frames = np.empty((len(indices), *size, 3), np.uint8)
    number, kept = 0, 0
    while capture.grab():
        if kept < len(indices) and number == indices[kept]:
            ok, image = capture.retrieve()
            if not ok:
                raise MediaError(f"{path}: frame {number} of {total} cannot be decoded", "undecodable_frame")
            if image.shape[:2] != (info.height, info.width):
                told, found = f"{info.height}x{info.width}", f"{image.shape[0]}x{image.shape[1]}"
                raise MediaError(f"{path}: frame {number} is {found}, the file says {told}", "varying_size")
            small = resize_bicubic(image, *size)[..., ::-1]
            while kept < len(indices) and number == indices[kept]:
                frames[kept] = small
                kept += 1
        number += 1
    clip = VideoClip(frames, indices, info.fps, number) if kept == len(indices) else None
    return clip, number


def read_image(path: str) -> np.ndarray:
    """u8[H, W, 3] RGB of an image file, EXIF rotation applied.

    Transparency is dropped, not composited, like Pillow's `convert("RGB")` that the HF image processors use: the
    colours stored under transparent pixels show.

    Raises:
      MediaError: "missing_file", "empty_file", "not_an_image".
    """
    _check_file(path, "image")
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:  # larger than OpenCV's limit on pixels
        raise MediaError(f"{path} cannot be read as an image ({error.err or error})", "not_an_image") from error
    if image is None:
        raise MediaError(f"{path} is not an image (or a damaged one)", "not_an_image")
    return image[..., ::-1]


@dataclasses.dataclass(frozen=True)
class StoredFrames:
    """Frames of one clip as JPEG files, picked from their source video when the data set was written.

    The frame numbers and the rate of the source come with them: without both, frames cannot be dated.

    Attributes:
      name: says which clip it is, in errors and as its identity.
      jpegs: T JPEG files.
      indices: their frame numbers in the source, ascending, one per file.
      source_fps: frames per second of the source.
      total_frames: frames that the source has.
    """

    name: str
    jpegs: tuple[bytes, ...]
    indices: tuple[int, ...]
    source_fps: float
    total_frames: int

    def plan(self, sample: SampleRule, resize: ResizeRule) -> tuple[np.ndarray, tuple[int, int]]:
        """Return which of the stored frames the rule takes, i64[n] in `jpegs`, and their (height, width) when resized.

        The stored frames count as the clip, at the mean rate they were taken: a set that was written with the same rule
        gives all its frames back, one with more frames is thinned by the rule. Decodes the first frame.

        Raises:
          MediaError: "missing_fps", "missing_indices" (not one per frame, not ascending), "one_frame",
            "undecodable_frame", "too_few_frames", "bad_size".
        """
        if not (math.isfinite(self.source_fps) and self.source_fps > 0):
            message = f"{self.name} has no frame rate ({self.source_fps}): its frames cannot be dated"
            raise MediaError(message, "missing_fps")
        count = len(self.jpegs)
        ascending = all(a < b for a, b in itertools.pairwise(self.indices))
        inside = not self.indices or (self.indices[0] >= 0 and self.indices[-1] < self.total_frames)
        if len(self.indices) != count or not ascending or not inside:
            raise MediaError(
                f"{self.name} has {count} frames and the frame numbers {list(self.indices)[:8]}... of a "
                f"source of {self.total_frames}: one number per frame is needed, ascending and inside the source",
                "missing_indices",
            )
        if count < 2:
            raise MediaError(f"{self.name} holds {count} frames, at least 2 are needed", "one_frame")
        height, width = self._decode(0).shape[:2]
        info = VideoInfo(height, width, count / self.total_frames * self.source_fps, count)
        return plan_frames(self.name, info, count, sample, resize)

    def read(self, sample: SampleRule, resize: ResizeRule) -> VideoClip:
        """Return the planned frames, resized. Raises MediaError as `plan`, and "varying_size"."""
        picked, size = self.plan(sample, resize)
        frames = np.empty((len(picked), *size, 3), np.uint8)
        first = None
        for n, position in enumerate(picked):
            image = self._decode(int(position))
            first = first or image.shape
            if image.shape != first:
                told, found = f"{first[0]}x{first[1]}", f"{image.shape[0]}x{image.shape[1]}"
                raise MediaError(f"{self.name}: frame {position} is {found}, the first one {told}", "varying_size")
            frames[n] = resize_bicubic(image, *size)[..., ::-1]
        return VideoClip(frames, np.asarray(self.indices, np.int64)[picked], self.source_fps, self.total_frames)

    def _decode(self, position: int) -> np.ndarray:
        """u8[H, W, 3] BGR of one stored frame."""
        data = self.jpegs[position]
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        except cv2.error:
            image = None
        if image is None:
            raise MediaError(f"{self.name}: stored frame {position} is no readable JPEG file", "undecodable_frame")
        return image
