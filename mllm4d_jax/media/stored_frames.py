"""Frames that come inside a data set as JPEG files instead of a video file, dated and resized like those of a video."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np

from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule, resize_bicubic
from mllm4d_jax.media.video import VideoClip, VideoInfo, plan_frames
from mllm4d_jax.qa.errors import MediaError


@dataclasses.dataclass(frozen=True)
class StoredFrames:
    """Frames of one clip, already picked from their source video when the data set was written.

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

    def check(self) -> None:
        """Raises MediaError: "missing_fps", "missing_indices" (not one per frame, not ascending), "one_frame"."""
        if not (math.isfinite(self.source_fps) and self.source_fps > 0):
            raise MediaError(
                f"{self.name} has no frame rate ({self.source_fps}): its frames cannot be dated", "missing_fps"
            )
        ascending = all(a < b for a, b in zip(self.indices[:-1], self.indices[1:], strict=True))
        inside = not self.indices or (self.indices[0] >= 0 and self.indices[-1] < self.total_frames)
        if len(self.indices) != len(self.jpegs) or not ascending or not inside:
            raise MediaError(
                f"{self.name} has {len(self.jpegs)} frames and the frame numbers {list(self.indices)[:8]}... of a "
                f"source of {self.total_frames}: one number per frame is needed, ascending and inside the source",
                "missing_indices",
            )
        if len(self.jpegs) < 2:
            raise MediaError(f"{self.name} holds {len(self.jpegs)} frames, at least 2 are needed", "one_frame")

    def plan(self, sample: SampleRule, resize: ResizeRule) -> tuple[np.ndarray, tuple[int, int]]:
        """Return which of the stored frames the rule takes, i64[n] in `jpegs`, and their (height, width) when resized.

        The stored frames count as the clip, at the mean rate they were taken: a set that was written with the same rule
        gives all its frames back, one with more frames is thinned by the rule. Decodes the first frame.

        Raises:
          MediaError: as `check`, and "undecodable_frame", "too_few_frames", "bad_size".
        """
        self.check()
        count = len(self.jpegs)
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
                raise MediaError(
                    f"{self.name}: frame {position} is {image.shape[0]}x{image.shape[1]}, the first one "
                    f"{first[0]}x{first[1]}",
                    "varying_size",
                )
            frames[n] = resize_bicubic(image, *size)[..., ::-1]
        indices = np.asarray(self.indices, np.int64)[picked]
        return VideoClip(frames, indices, self.source_fps, self.total_frames)

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
