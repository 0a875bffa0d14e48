"""The types of the encoder: how a record becomes one (VideoOptions), and what comes out (Example)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.files.cache import DEFAULT_GIB
from mllm4d_jax.media import frame_sampling, resize
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.qa.errors import ProcessorError

# The paper's training: every frame between 28 x 28 and 224 x 224 pixels.
FRAME_BUDGET = (784, 50176)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Patch grid of one image or video, before merging: `t` temporal patches of `h` x `w` patches."""

    modality: str  # "image" | "video"
    t: int
    h: int
    w: int

    @property
    def thw(self) -> tuple[int, int, int]:
        return self.t, self.h, self.w


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """How a clip becomes frames and pixels.

    Attributes:
      num_frames: at most this many frames; None = no cap of our own (then `fps` must be given).
      fps: frames per second of video to sample; None = `min(num_frames, total)` frames.
      sampling: which frames. "uniform" and "qwen3_vl" spread them over the clip with both ends included; "qwen2_5_vl"
        takes the start of equal intervals, an even number of frames; "qwen_vl_utils" is the first with an even number.
      resize_rule: what the pixel budget bounds. "per_frame": the area of each frame; "total": the sum over all frames
        (Qwen3-VL HF video processor); "qwen_vl_utils": each frame, with that package's bounds and rounding.
      min_pixels, max_pixels: the budget, areas in pixels. None = the rule's own: 784 and 50,176 (224 x 224) per frame
        as in the paper's training; the processor folder's budget for "total"; the package's for "qwen_vl_utils", whose
        own upper bound holds beside max_pixels.
      image_min_pixels, image_max_pixels: budget of still images; None = the processor folder's.
      decode_timeout_s: seconds a clip or image may take to decode before its decoder process is killed.
      decode_threads: of the codec, for each clip that is decoded; each holds frames of its own in memory.
      cache_gib: of the machine's disk, for clips that are in a bucket (`files.cache`).
      outer_markers: keep a vision_start/vision_end pair around a whole clip (HF 5.x) instead of replacing it (release).
      position_rule: Qwen2.5-VL temporal positions, see `positions.mrope_positions`.
    """

    num_frames: int | None = 32
    fps: float | None = None
    sampling: str = "uniform"
    resize_rule: str = "per_frame"
    min_pixels: int | None = None
    max_pixels: int | None = None
    image_min_pixels: int | None = None
    image_max_pixels: int | None = None
    decode_timeout_s: float = 60.0
    decode_threads: int = 1
    cache_gib: float = DEFAULT_GIB
    outer_markers: bool = False
    position_rule: str = "release"

    def __post_init__(self):
        rules = (("sampling", self.sampling, frame_sampling.RULES), ("resize", self.resize_rule, resize.RULES))
        for kind, rule, known in rules:
            if rule not in known:
                raise ProcessorError(f"unknown {kind} rule {rule!r} (known: {', '.join(known)})")
        if self.num_frames is None and self.fps is None:
            raise ProcessorError("give num_frames, fps, or both: nothing says how many frames to take from a clip")
        if self.num_frames is not None and self.num_frames < 2:
            raise ProcessorError(f"num_frames must be at least 2, got {self.num_frames}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ProcessorError(f"fps must be a positive number or None, got {self.fps}")
        if not self.decode_timeout_s > 0:
            raise ProcessorError(f"decode_timeout_s must be positive, got {self.decode_timeout_s}")
        if not 1 <= self.decode_threads <= 64:
            raise ProcessorError(f"decode_threads must be 1 to 64, got {self.decode_threads}")
        for low, high in ((self.min_pixels, self.max_pixels), (self.image_min_pixels, self.image_max_pixels)):
            if low is not None and high is not None and not 0 < low <= high:
                raise ProcessorError(f"pixel budget must satisfy 0 < min <= max, got {low} and {high}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Options from a config group such as `config.video`; there, zero frames, fps or pixels mean "not set".

        Raises:
          ProcessorError: a key that is not an option, or a value that is not allowed.
        """
        values = dict(values.items())
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ProcessorError(f"unknown video options {', '.join(unknown)} (known: {', '.join(sorted(known))})")
        for name in ("fps", "num_frames", "min_pixels", "max_pixels"):
            if name in values and not values[name]:
                values[name] = None
        return cls(**values)

    def resize_for(self, processor: ProcessorConfig) -> ResizeRule:
        """Return the resize rule of a clip, with its own budget where the options leave it open.

        Raises:
          ProcessorError: the lower budget exceeds the upper one.
        """
        budgets = {"per_frame": FRAME_BUDGET, "total": (processor.video_min_pixels, processor.video_max_pixels)}
        low, high = budgets.get(self.resize_rule, (resize.utils_min_pixels(processor.factor), None))
        low = low if self.min_pixels is None else self.min_pixels
        high = high if self.max_pixels is None else self.max_pixels
        if high is not None and low > high:
            raise ProcessorError(f"resize rule {self.resize_rule!r}: min_pixels {low} exceeds max_pixels {high}")
        return ResizeRule(self.resize_rule, processor.factor, processor.temporal_patch_size, low, high)


@dataclasses.dataclass(frozen=True)
class Example:
    """A record made ready for the model, once; training, sampling and evaluation share it. Arrays are read-only.

    Attributes:
      key: the record's key.
      tokens: i32[S].
      positions: i32[3, S], the (T, H, W) axes.
      rope_delta: generated token k has position S + rope_delta + k on all three axes (`positions.next_position`).
      supervised: bool[S], token s is a training target (assistant text, its `<|im_end|>` and the newline after it).
      patches: f32[N, C*temporal_patch_size*patch_size^2], all images and videos in reading order, merge-block order.
      grids: one per image or video, same order; `sum(t*h*w) == N`.
      timestamps: one tuple per video: seconds of each temporal patch (the mean of its frames' times).
      text: the expanded prompt that was tokenised.
    """

    key: str
    tokens: np.ndarray
    positions: np.ndarray
    rope_delta: int
    supervised: np.ndarray
    patches: np.ndarray
    grids: tuple[Grid, ...]
    timestamps: tuple[tuple[float, ...], ...]
    text: str

    def __post_init__(self):
        for array in (self.tokens, self.positions, self.supervised, self.patches):
            array.setflags(write=False)
