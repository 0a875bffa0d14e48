"""Frame sizes (the smart_resize family) and the exact uint8 bicubic resampler of the Qwen-VL processors.

All size arithmetic is in Python floats with Python's half-even `round`, as in the processors: any other rounding moves
some sizes by a whole block.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import cv2
import numpy as np

RULES = ("per_frame", "total", "qwen_vl_utils")
MAX_RATIO = 200
_STRIP_BYTES = 8 << 20  # working set of the width pass: fits a core's share of the cache, bounds memory for 8K frames
_BAND_INPUTS = 48  # input rows per band of outputs, besides its margins: larger wastes zeros, smaller reads rows twice
# Products of at most this many multiplications stay on one thread in OpenBLAS, whose thread hand-over costs more than a
# whole strip on a busy machine (measured: 0.2 s a clip becomes 2 s).
_PRODUCT_SIZE = 1 << 18
_CENTRE = 128  # taken from every pixel, so that sums are half as large and most fit float32


class SizeError(ValueError):
    """No valid frame size exists for the input (too narrow, too few frames, or a budget below one block)."""


def image_size(h: int, w: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """(h, w) of a resized image (HF Qwen2-VL image processor). The budget bounds h*w; sides are multiples of factor.

    Raises:
      SizeError: one side is more than 200 times the other.
    """
    return _fit(h, w, 1, 1, factor, min_pixels, max_pixels)


def video_size(
    num_frames: int, h: int, w: int, factor: int, temporal_patch_size: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """(h, w) of resized frames (HF Qwen3-VL video processor). The budget bounds frames*h*w.

    Frames smaller than one block are first enlarged to it. Whether the budget is exceeded is judged on the frame count
    rounded to temporal patches (half-even), how far to scale on the count itself; both as in the processor.

    Args:
      num_frames: sampled frames, before a short last temporal patch is filled.

    Raises:
      SizeError: fewer frames than one temporal patch, or one side more than 200 times the other.
    """
    if num_frames < temporal_patch_size:
        raise SizeError(f"{num_frames} frames are fewer than one temporal patch ({temporal_patch_size} frames)")
    if h < factor or w < factor:
        scale = max(factor / h, factor / w)
        h, w = int(h * scale), int(w * scale)
    judged = round(num_frames / temporal_patch_size) * temporal_patch_size
    return _fit(h, w, num_frames, judged, factor, min_pixels, max_pixels)


def _fit(h: int, w: int, frames: int, judged: int, factor: int, low: float, high: float) -> tuple[int, int]:
    """Rounded sides if `judged` frames of them are within the budget, else sides so scaled that `frames` frames are."""
    _check_ratio(h, w)
    new_h, new_w = (round(side / factor) * factor for side in (h, w))
    volume = judged * new_h * new_w
    if volume > high:
        shrink = math.sqrt(frames * h * w / high)
        new_h, new_w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (h, w))
    elif volume < low:
        grow = math.sqrt(low / (frames * h * w))
        new_h, new_w = (math.ceil(side * grow / factor) * factor for side in (h, w))
    return new_h, new_w


def utils_image_size(
    h: int, w: int, factor: int, min_pixels: float | None = None, max_pixels: float | None = None
) -> tuple[int, int]:
    """(h, w) by the qwen-vl-utils image rule; default budget 4 to 16,384 tokens of factor^2 pixels.

    Raises:
      SizeError: ratio above 200, a lower budget above the upper one, or a side that the budget leaves no block for (the
        package would return 0).
    """
    low = 4 * factor**2 if min_pixels is None else min_pixels
    high = 16384 * factor**2 if max_pixels is None else max_pixels
    if low > high:
        raise SizeError(f"a frame of at least {low:g} and at most {high:g} pixels")
    _check_ratio(h, w)
    new_h, new_w = (max(factor, round(side / factor) * factor) for side in (h, w))
    if new_h * new_w > high:
        shrink = math.sqrt(h * w / high)
        new_h, new_w = (math.floor(side / shrink / factor) * factor for side in (h, w))
        if not new_h or not new_w:
            raise SizeError(f"a {h}x{w} frame within {high:g} pixels leaves a side below one block of {factor}")
    elif new_h * new_w < low:
        grow = math.sqrt(low / (h * w))
        new_h, new_w = (math.ceil(side * grow / factor) * factor for side in (h, w))
    return new_h, new_w


def utils_frame_budget(
    num_frames: int, factor: int, min_pixels: float | None = None, max_pixels: float | None = None
) -> tuple[float, float]:
    """(min, max) area of a frame by qwen-vl-utils 0.0.14 (`fetch_video`).

    At least 128 tokens of factor^2 pixels, or `min_pixels`. At most 768 and an even share of 115,200 token pairs over
    the clip, but 1.05 times the minimum; `max_pixels` can only lower that.
    """
    low = utils_min_pixels(factor) if min_pixels is None else min_pixels
    per_frame, total = 768 * factor**2, 128000 * factor**2 * 0.9
    cap = max(min(per_frame, total / num_frames * 2), int(low * 1.05))
    return low, cap if max_pixels is None else min(max_pixels, cap)


def utils_min_pixels(factor: int) -> int:
    """The area below which qwen-vl-utils enlarges a frame, where none is given: 128 tokens of factor^2 pixels."""
    return 128 * factor**2


def _check_ratio(h: int, w: int) -> None:
    if min(h, w) < 1 or max(h, w) / min(h, w) > MAX_RATIO:
        raise SizeError(f"a {h}x{w} frame: one side is more than {MAX_RATIO} times the other")


@dataclasses.dataclass(frozen=True)
class ImageRule:
    """How large an image becomes: sides are multiples of `factor`, the area is within the budget (pixels)."""

    factor: int
    min_pixels: float
    max_pixels: float

    def size(self, h: int, w: int) -> tuple[int, int]:
        """(h, w) of the resized image. Raises SizeError when there is none."""
        return image_size(h, w, self.factor, self.min_pixels, self.max_pixels)


@dataclasses.dataclass(frozen=True)
class ResizeRule:
    """How large the frames of a clip become.

    Attributes:
      rule: one of `RULES`.
      factor: pixel side of a merged token; every side is a multiple of it.
      temporal_patch_size: frames per temporal patch.
      min_pixels, max_pixels: budget of the rule, areas; None = qwen-vl-utils' own (only for that rule). Under that
        rule max_pixels cannot raise the package's own bound of a clip of so many frames.
    """

    rule: str
    factor: int
    temporal_patch_size: int
    min_pixels: float | None
    max_pixels: float | None

    def size(self, num_frames: int, h: int, w: int) -> tuple[int, int]:
        """(h, w) of the resized frames. Raises SizeError when there is none."""
        if self.rule == "qwen_vl_utils":
            budget = utils_frame_budget(num_frames, self.factor, self.min_pixels, self.max_pixels)
            return utils_image_size(h, w, self.factor, *budget)
        if self.min_pixels is None or self.max_pixels is None:
            raise ValueError(f"resize rule {self.rule!r} needs min_pixels and max_pixels")
        if self.rule == "per_frame":
            return image_size(h, w, self.factor, self.min_pixels, self.max_pixels)
        if self.rule == "total":
            return video_size(num_frames, h, w, self.factor, self.temporal_patch_size, self.min_pixels, self.max_pixels)
        raise ValueError(f"unknown resize rule {self.rule!r} (known: {', '.join(RULES)})")

    def largest_frame(self, num_frames: int) -> int:
        """Return the largest area, in pixels, of a resized frame of a clip of so many frames.

        It is that of frames of whole merged tokens. `size` gives a larger one only where a side has shrunk to a single
        token, or where both budgets are so near each other that enlarging, which rounds up, goes past the upper one.
        """
        high = self.max_pixels
        if self.rule == "qwen_vl_utils":
            high = utils_frame_budget(num_frames, self.factor, self.min_pixels, self.max_pixels)[1]
        elif self.rule == "total":
            # Judged on the count rounded to temporal patches, scaled by the count itself: the smaller allows more.
            step = self.temporal_patch_size
            high /= max(1, min(num_frames, round(num_frames / step) * step))
        return max(1, int(high / self.factor**2)) * self.factor**2


def resize_bicubic(frames: np.ndarray, h: int, w: int) -> np.ndarray:
    """Resizes u8[..., H, W, C] to u8[..., h, w, C], bit-equal to torch's antialiased uint8 bicubic (C <= 4).

    Keys cubic (a = -0.5) stretched by the shrink factor, weights quantised to int16 with as many fraction bits as fit,
    width first, rounded and clipped to uint8 between the passes. An axis that keeps its size is left alone.
    """
    if frames.dtype != np.uint8 or frames.ndim < 3:
        raise ValueError(f"expected u8[..., H, W, C], got {frames.dtype}{list(frames.shape)}")
    *lead, height, width, channels = frames.shape
    if (height, width) == (h, w):
        return frames.copy()
    out = np.empty((math.prod(lead), h, w, channels), np.uint8)
    for source, target in zip(frames.reshape(-1, height, width, channels), out, strict=True):
        _resize_frame(source, target)
    return out.reshape(*lead, h, w, channels)


def _resize_frame(source: np.ndarray, target: np.ndarray) -> None:
    """u8[H, W, C] into u8[h, w, C]."""
    height, width, channels = source.shape
    h, w, _ = target.shape
    narrow = source
    if width != w:
        narrow = np.empty((height, w, channels), np.uint8)
        taps = _taps(width, w)
        rows = max(1, _STRIP_BYTES // (width * channels * taps.dtype.itemsize))
        for top in range(0, height, rows):
            strip = source[top : top + rows]
            # Transposed, one matrix product covers all rows and channels of the strip.
            columns = cv2.transpose(np.ascontiguousarray(strip)).reshape(width, -1)
            columns = _apply(taps, columns).reshape(w, len(strip), channels)
            narrow[top : top + rows] = cv2.transpose(columns).reshape(len(strip), w, channels)
    if height == h:
        target[:] = narrow
    else:
        target[:] = _apply(_taps(height, h), narrow.reshape(height, -1)).reshape(h, w, channels)


@dataclasses.dataclass(frozen=True)
class _Taps:
    """Integer weights of one axis, in bands of outputs: (first output, first input, weights [outputs, inputs], rest).

    They weigh pixels less 128; `rest` [outputs, 1] is what the sums lack for it, and half a unit of the result. Held in
    the narrowest float in which every sum of weight * pixel is an exact integer.
    """

    bands: tuple[tuple[int, int, np.ndarray, np.ndarray], ...]
    outputs: int
    shift: int
    dtype: np.dtype


def _apply(taps: _Taps, rows: np.ndarray) -> np.ndarray:
    """Resamples u8[in, K] along its first axis to u8[out, K]."""
    out = np.empty((taps.outputs, rows.shape[1]), np.uint8)
    scale, centre = taps.dtype.type(0.5**taps.shift), taps.dtype.type(_CENTRE)
    for first_out, first_in, weights, rest in taps.bands:
        pixels = rows[first_in : first_in + weights.shape[1]].astype(taps.dtype)
        np.subtract(pixels, centre, out=pixels)
        total = _matmul(weights, pixels)
        # 128 + ((total + rest) >> shift): scaling by a power of two is exact, floor is the arithmetic shift.
        np.add(total, rest, out=total)
        np.multiply(total, scale, out=total)
        np.floor(total, out=total)
        np.add(total, centre, out=total)
        np.clip(total, 0, 255, out=total)
        out[first_out : first_out + len(weights)] = total
    return out


def _matmul(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """weights @ rows, [m, k] x [k, n], as a batch of narrow products over views of `rows`."""
    (m, k), n = weights.shape, rows.shape[1]
    width = max(8, _PRODUCT_SIZE // (m * k))
    whole = n // width * width
    out = np.empty((m, n), rows.dtype)
    if whole:
        batch = rows[:, :whole].reshape(k, -1, width).transpose(1, 0, 2)
        np.matmul(weights, batch, out=out[:, :whole].reshape(m, -1, width).transpose(1, 0, 2))
    if whole < n:
        np.matmul(weights, rows[:, whole:], out=out[:, whole:])
    return out


@lru_cache(maxsize=64)
def _taps(size_in: int, size_out: int) -> _Taps:
    """Quantised weights that resample an axis of `size_in` to `size_out`."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centres = (np.arange(size_out) + 0.5) * scale
    low = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centres + support + 0.5).astype(np.int64), size_in)
    rows = []
    for lo, hi, centre in zip(low.tolist(), high.tolist(), centres.tolist(), strict=True):
        weights = _keys_cubic((np.arange(lo, hi) - centre + 0.5) / stretch)
        rows.append(weights / weights.sum())
    largest = max(float(r.max()) for r in rows)
    shift = 0
    while shift < 21 and int(0.5 + largest * (1 << (shift + 1))) < 1 << 15:
        shift += 1
    quantised = [np.trunc(r * (1 << shift) + np.copysign(0.5, r)) for r in rows]
    # Sums of the taps of 2^shift, off by their rounding: what pixels less 128 leave out beyond 128 in the result.
    rests = [_CENTRE * (float(q.sum()) - (1 << shift)) + (1 << shift) / 2 for q in quantised]
    bound = max(_CENTRE * float(np.abs(q).sum()) + abs(rest) for q, rest in zip(quantised, rests, strict=True))
    dtype = np.dtype(np.float32 if bound < 1 << 24 else np.float64)
    bands = []
    band = max(4, min(32, round(_BAND_INPUTS / stretch)))
    for start in range(0, size_out, band):
        stop = min(start + band, size_out)
        first, last = int(low[start:stop].min()), int(high[start:stop].max())
        block = np.zeros((stop - start, last - first), dtype)
        for i in range(start, stop):
            block[i - start, low[i] - first : high[i] - first] = quantised[i]
        bands.append((start, first, block, np.array(rests[start:stop], dtype)[:, None]))
    return _Taps(tuple(bands), size_out, shift, dtype)


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5, f64."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
