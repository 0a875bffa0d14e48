"""Frames that came with a record, as JPEG files picked from their source video when the data set was written."""

from __future__ import annotations

import dataclasses
import itertools
import math

import cv2
import numpy as np

from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule, resize_bicubic
from mllm4d_jax.media.video import VideoClip, VideoInfo, plan_frames
from mllm4d_jax.qa.errors import MediaError


@dataclasses.dataclass(frozen=True)
class StoredFrames:
    """Frames of one clip.

    Attributes:
      name: says which clip it is, in errors and as its identity.
      jpegs: T JPEG files.
      indices: their frame numbers in the source, ascending, one per file.
      times: seconds at which they show in the source, ascending, one per file.
      source_fps: frames per second of the source.
      total_frames: frames that the source has.
    """

    name: str
    jpegs: tuple[bytes, ...]
    indices: tuple[int, ...]
    times: tuple[float, ...]
    source_fps: float
    total_frames: int

    def plan(self, sample: SampleRule, resize: ResizeRule) -> tuple[np.ndarray, tuple[int, int]]:
        """Return which of the stored frames the rule takes, i64[n] in `jpegs`, and their (height, width) when resized.

        The stored frames count as the clip, at the mean rate they were taken: a set that was written with the same rule
        gives all its frames back, one with more frames is thinned by the rule. Decodes the first frame.

        Raises:
          MediaError: "missing_fps" (no rate, or not one time per frame), "missing_indices" (not one per frame, not
            ascending), "one_frame", "undecodable_frame", "too_few_frames", "bad_size".
        """
        if not (math.isfinite(self.source_fps) and self.source_fps > 0):
            message = f"{self.name} has no frame rate ({self.source_fps}): its frames cannot be dated"
            raise MediaError(message, "missing_fps")
        count, times = len(self.jpegs), np.array(self.times, np.float64)
        if len(times) != count or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            message = f"{self.name} has {count} frames and the times {list(self.times)[:8]}...: one each, ascending"
            raise MediaError(message, "missing_fps")
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
        info = VideoInfo(height, width, count / self.total_frames * self.source_fps, times)
        return plan_frames(self.name, info, sample, resize)

    def sampled_of(self, sample: SampleRule) -> int:
        """Return how many of the source's frames stand in the part that the rule is bound to, by the stored ones."""
        times = np.array(self.times, np.float64)
        return round(self.total_frames * len(times[sample.part(times)]) / len(times))

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
        indices, times = np.asarray(self.indices, np.int64)[picked], np.asarray(self.times, np.float64)[picked]
        return VideoClip(frames, indices, times, self.source_fps, self.sampled_of(sample))

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
