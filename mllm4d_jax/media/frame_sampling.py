"""Which frames of a clip are used."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_ROUNDING_S = 1e-6  # by which times that mean the same frame may differ

RULES = ("uniform", "qwen3_vl", "qwen2_5_vl", "qwen_vl_utils")


class SamplingError(ValueError):
    """The clip has too few frames for the rule."""


def sample_indices(
    rule: str,
    total: int,
    video_fps: float,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> np.ndarray:
    """Frame numbers exactly as the named processor takes them: i64[n], ascending.

    - "qwen3_vl" (HF 5.x; "uniform" is the same): n = int(total/video_fps*fps) within the bounds and `total`; frames
      spread evenly with both ends included, half-even rounding. An explicit num_frames is taken as it is, so that
      frames repeat when it exceeds the total. n may be odd.
    - "qwen2_5_vl" (HF 5.x): even n; frame i is floor(i * (total/n)) while i * (total/n) < total. The product is rounded
      to float32 before the floor, as `torch.arange` rounds it: from just below a whole number up to it. Where total/n
      is rounded down in binary the processor gets one index too many, equal to `total`; it is reproduced here.
    - "qwen_vl_utils": even n; spread as in the first rule.

    Args:
      total: frames in the file; video_fps: its frame rate.
      fps, num_frames: exactly one of them.
      min_frames, max_frames: bounds of the `fps` form.

    Raises:
      SamplingError: "qwen2_5_vl" or "qwen_vl_utils" on a clip of fewer than 2 frames, or fewer than num_frames.
      ValueError: unknown rule, or not exactly one of fps and num_frames.
    """
    if (fps is None) == (num_frames is None):
        raise ValueError("give exactly one of fps and num_frames")
    if rule not in RULES:
        raise ValueError(f"unknown sampling rule {rule!r} (known: {', '.join(RULES)})")
    if rule in ("qwen3_vl", "uniform"):
        n = num_frames if fps is None else min(max(int(total / video_fps * fps), min_frames), max_frames, total)
        return _spread(total, n)
    if fps is None:
        n = round(num_frames / 2) * 2
    else:
        low = min_frames if rule == "qwen2_5_vl" else math.ceil(min_frames / 2) * 2
        high = math.floor(min(max_frames, total) / 2) * 2
        n = math.floor(min(max(total / video_fps * fps, low), high, total) / 2) * 2
    if not 2 <= n <= total:
        raise SamplingError(f"sampling rule {rule} wants {n} frames of a clip of {total}")
    if rule == "qwen_vl_utils":
        return _spread(total, n)
    step = total / n
    return (np.arange(math.ceil(total / step)) * step).astype(np.float32).astype(np.int64)


def _spread(total: int, n: int) -> np.ndarray:
    return np.linspace(0, total - 1, n).round().astype(np.int64)


@dataclasses.dataclass(frozen=True)
class SampleRule:
    """The sampling half of `VideoOptions`: at most `num_frames` frames, `fps` per second when that is given.

    Without `fps` a clip gives `min(num_frames, total)` frames (rounded down to even where the rule wants even numbers);
    with it, the rule's `fps` form, at least 4 frames and at most `num_frames` (768 when None), as released. Never
    repeats a frame and never names one that is not there.

    `start` and `end`, seconds, bound the part of the clip that is sampled, the frames at both included; None = where
    the clip itself ends.
    """

    rule: str
    num_frames: int | None
    fps: float | None
    start: float | None = None
    end: float | None = None

    def part(self, times: np.ndarray) -> slice:
        """Return the frames between `start` and `end`; `times`: f64[N], seconds at which each shows, ascending."""
        first = 0 if self.start is None else int(np.searchsorted(times, self.start - _ROUNDING_S, "left"))
        after = len(times) if self.end is None else int(np.searchsorted(times, self.end + _ROUNDING_S, "right"))
        return slice(first, max(first, after))

    def indices(self, total: int, video_fps: float) -> np.ndarray:
        """Frame numbers i64[n] of a clip of `total` >= 2 frames. Raises SamplingError when there are too few."""
        if self.fps is None:
            n = min(self.num_frames, total)
            if self.rule in ("qwen2_5_vl", "qwen_vl_utils"):
                n -= n % 2
            return sample_indices(self.rule, total, video_fps, num_frames=n)
        cap = 768 if self.num_frames is None else self.num_frames
        found = sample_indices(self.rule, total, video_fps, fps=self.fps, max_frames=cap)
        return found[found < total]


def nearest_in_time(times: np.ndarray, even: np.ndarray) -> np.ndarray:
    """Return the frames, i64[n] strictly ascending, that stand nearest to the moments of evenly spread ones.

    Frame k of a clip at a constant rate shows k steps after the first. Where all times are within half a step of that,
    `even` itself comes back; else each moment takes the frame nearest to it that comes after those taken before and
    leaves enough for those to come.

    Args:
      times: f64[N], seconds, ascending.
      even: i64[n], ascending, frame numbers that a rule takes of N frames at a constant rate.
    """
    last = len(times) - 1
    if last < 1 or len(even) > len(times):
        return even
    moments = times[0] + (times[-1] - times[0]) * np.arange(last + 1) / last
    if np.abs(times - moments).max() < 0.5 * (times[-1] - times[0]) / last:
        return even
    after = np.clip(np.searchsorted(times, moments[even]), 1, last)
    nearest = np.where(moments[even] - times[after - 1] <= times[after] - moments[even], after - 1, after)
    taken, before = np.empty(len(even), np.int64), -1
    for i, frame in enumerate(nearest.tolist()):
        before = taken[i] = min(max(frame, before + 1), last + 1 - (len(even) - i))
    return taken
