"""Disparity and metric depth of one rectified stereo pair (OpenCV semi-global matching, sub-pixel refined)."""

from __future__ import annotations

import math

import cv2
import numpy as np

# Matching at twice the size halves the error of SGBM's parabola (2.1 % -> 1.0 % median at 512 px, 60 deg).
_UPSAMPLE = 2
# The rest of SGBM's settings were chosen on photographs (Middlebury 2003 and 2014), of which they keep more.
_BLOCK = 3  # matching window, pixels of the image matched
_SPECKLE = 60  # native pixels: smaller patches of other disparity are mismatches
_SEARCH_MARGIN = (
    4  # native pixels beyond what the match at native size found; most of the time goes by the range searched
)
_MIN_AGREEING = 3  # of the small pixels of one native pixel; a surface's border runs through a pixel
_REFINE_WINDOW = 9  # window of the sub-pixel refinement, native pixels
_REFINE_STEPS = 3
_FLAT_RANGE = 1.5  # refine only where disparity changes by less than this inside the window: no step edge
_SGBM_ERROR = 0.08  # native pixels: what the refinement has to beat to be believed
_MAX_LR_ERROR = 4.0  # native pixels between left->right and right->left matches; more is a contradiction
# Metres. The far limit is Stereo4D's: with its 63 mm baseline that is 1.4 px of disparity at 512 px and 60 degrees.
MIN_DEPTH, MAX_DEPTH = 0.1, 20.0


class StereoError(ValueError):
    """The stereo stage cannot use its input.

    Attributes:
      reason: short machine word, e.g. "bad_input", "pose_failed", "low_disparity".
      frame: frame number the message is about, or None.
    """

    def __init__(self, message: str, reason: str = "bad_input", frame: int | None = None):
        super().__init__(message if frame is None else f"frame {frame}: {message}")
        self.reason, self.frame = reason, frame


def check_array(name: str, array: np.ndarray, dtype: type | None, shape: tuple[int | None, ...]) -> None:
    """Raise StereoError unless an array has that dtype (None = any) and shape (None = any size above 0)."""
    sides = array.ndim == len(shape) and all(
        n > 0 if w is None else n == w for n, w in zip(array.shape, shape, strict=True)
    )
    if not sides or (dtype is not None and array.dtype != dtype):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        kind = "" if dtype is None else np.dtype(dtype)
        raise StereoError(f"{name} must be {kind}[{wanted}], got {array.dtype}{list(array.shape)}")


def match_pair(left: np.ndarray, right: np.ndarray, max_disparity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate the disparity of the left view of a rectified pair, and how well the right view confirms it.

    Semi-global matching (OpenCV SGBM, 3-way) on images enlarged twice and padded on the left, with its own left-right
    check; what a match of the right view at native size contradicts goes too. Then it is moved towards the minimum of
    the window's squared difference, found by a few Gauss-Newton steps (one-dimensional Lucas-Kanade). SGBM alone pulls
    disparities towards its grid ("pixel locking"), which far away, where a disparity is a few pixels, biases depths by
    per cents; the last step removes most of that. Photographs are noisy: how far it moves depends on what the window's
    texture and what is left of the difference say about its own error.

    Args:
      left: u8[H,W,3] RGB or u8[H,W].
      right: same shape; a point at column x of `left` is at column x - disparity, same row, of `right`.
      max_disparity: largest disparity searched, native pixels; the nearest depth is fx * baseline / max_disparity.

    Returns:
      disparity: f32[H,W] native pixels, 0 where invalid.
      valid: bool[H,W]; False where occluded, off the right image, or ambiguous (such as without texture).
      left_right: f32[H,W] pixels between the match there and the way back, inf where there is none.

    Raises:
      StereoError: shapes or dtypes do not fit, or max_disparity is not in [1, W).
    """
    left, right = _grey(left, "left"), _grey(right, "right")
    if left.shape != right.shape:
        raise StereoError(f"left is {left.shape} and right {right.shape}; the pair must be rectified to one size")
    width = left.shape[1]
    if not 1 <= max_disparity < width:
        raise StereoError(f"max_disparity {max_disparity} must be between 1 and the width {width} (exclusive)")
    mirrored = _match(right[:, ::-1], left[:, ::-1], max_disparity, 1)[:, ::-1]  # of the right view
    coarse = _match(left, right, min(max_disparity, _largest(mirrored) + _SEARCH_MARGIN), _UPSAMPLE)
    left_right = left_right_error(coarse, np.where(mirrored > 0, mirrored, np.nan))
    contradicted = np.isfinite(left_right) & (left_right > _MAX_LR_ERROR)
    inside = np.arange(width) - coarse >= 1  # at the right view's first column also what lies beyond it ends up
    valid = (coarse > 0) & ~contradicted & inside
    disparity = _refine(left, right, coarse, valid)
    valid &= (disparity > 0) & (disparity <= max_disparity)
    return np.where(valid, disparity, 0).astype(np.float32), valid, left_right


def beyond_search(left: np.ndarray, right: np.ndarray, max_disparity: int) -> tuple[float, int]:
    """Look for matches beyond a search range: nearer surfaces would get none, or wrong ones.

    A search of three times the range at native size, of which only matches count that both views confirm.

    Args: as `match_pair`.

    Returns:
      Share of all pixels that match beyond `max_disparity`, and the range in pixels that takes in all but 0.5 % of the
      matches with some to spare.
    """
    first, second = _grey(left, "left"), _grey(right, "right")
    wider = max(max_disparity, min(3 * max_disparity, first.shape[1] // 2))
    found = _match(first, second, wider, 1)
    back = _match(second[:, ::-1], first[:, ::-1], wider, 1)[:, ::-1]
    sure = (found > 0) & (left_right_error(found, np.where(back > 0, back, np.nan)) <= 1)
    if not sure.any():
        return 0.0, max_disparity
    needed = math.ceil(np.percentile(found[sure], 99.5)) + 2 * _SEARCH_MARGIN
    return float((sure & (found > max_disparity)).mean()), needed


def left_right_error(disparity: np.ndarray, right_disparity: np.ndarray) -> np.ndarray:
    """Return |d_left(x) - d_right(x - d_left)| in pixels, f32[H,W]; inf where the other view has no match (NaN)."""
    columns = np.arange(disparity.shape[1])
    target = np.rint(columns - disparity).astype(np.int64)
    inside = (target >= 0) & (target < disparity.shape[1])
    other = np.take_along_axis(right_disparity, np.clip(target, 0, disparity.shape[1] - 1), axis=1)
    error = np.abs(disparity - other)
    return np.where(inside & np.isfinite(error), error, np.inf).astype(np.float32)


def depth_from_disparity(
    disparity: np.ndarray, valid: np.ndarray, fx: float, baseline: float, max_depth: float = MAX_DEPTH
) -> np.ndarray:
    """Return depth z = fx * baseline / disparity, f32[...] metres, NaN where invalid or outside [0.1, max_depth].

    Args:
      disparity: f32[...] pixels.
      valid: bool[...], same shape.
      fx: focal length in pixels of the same image.
      baseline: distance of the two optical centres, metres.
      max_depth: metres.

    Raises:
      StereoError: fx, the baseline or max_depth is not positive.
    """
    for name, value in {"fx": fx, "baseline": baseline, "max_depth": max_depth}.items():
        if not (math.isfinite(value) and value > 0):
            raise StereoError(f"{name} must be a positive number, got {value}")
    usable = valid & (disparity > 0)
    depth = fx * baseline / np.where(usable, disparity, 1.0)
    return np.where(usable & (depth >= MIN_DEPTH) & (depth <= max_depth), depth, np.nan).astype(np.float32)


def split_side_by_side(frames: np.ndarray, layout: str = "left_right") -> tuple[np.ndarray, np.ndarray]:
    """Split a side-by-side or top-bottom stereo video into its two views (NumPy views on u8[T,H,W,3]).

    Args:
      frames: u8[T,H,W,3] packed frames.
      layout: "left_right" (left eye in the left half), "right_left", "top_bottom" (left eye on top), "bottom_top".

    Returns:
      left, right: u8[T,H,W/2,3] or u8[T,H/2,W,3].

    Raises:
      StereoError: unknown layout, or the split side is odd.
    """
    axes = {"left_right": (2, False), "right_left": (2, True), "top_bottom": (1, False), "bottom_top": (1, True)}
    if layout not in axes:
        raise StereoError(f"unknown layout {layout!r}; choose one of {sorted(axes)}")
    axis, swapped = axes[layout]
    if frames.shape[axis] % 2:
        raise StereoError(f"layout {layout} cannot halve a side of {frames.shape[axis]} pixels")
    first, second = np.split(frames, 2, axis=axis)
    return (second, first) if swapped else (first, second)


def _grey(image: np.ndarray, name: str) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise StereoError(f"{name} must be u8[H,W,3] (RGB) or u8[H,W], got {image.dtype} {image.shape}")
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _largest(disparity: np.ndarray) -> int:
    """The largest disparity, rounded up, that more pixels have than a speckle of mismatches; 0 if none has one."""
    count = np.bincount(np.ceil(disparity[disparity > 0]).astype(int), minlength=1)
    return int(np.flatnonzero(np.cumsum(count[::-1])[::-1] > _SPECKLE).max(initial=0))


def _match(left: np.ndarray, right: np.ndarray, max_disparity: int, scale: int) -> np.ndarray:
    """SGBM disparity f32[H,W] in native pixels of u8[H,W] views matched at `scale`; 0 = none."""
    height, width = left.shape
    candidates = 16 * math.ceil((max_disparity * scale + 1) / 16)
    # SGBM leaves the first `candidates` columns empty: padding gives them to columns that do not exist.
    views = []
    for view in (left, right):
        large = view
        if scale > 1:
            large = cv2.resize(view, (width * scale, height * scale), interpolation=cv2.INTER_CUBIC)
        views.append(cv2.copyMakeBorder(large, 0, 0, candidates, 0, cv2.BORDER_REPLICATE))
    matcher = cv2.StereoSGBM_create(
        minDisparity=0,
        numDisparities=candidates,
        blockSize=_BLOCK,
        P1=8 * _BLOCK**2,
        P2=32 * _BLOCK**2,
        disp12MaxDiff=1,
        preFilterCap=15,
        uniquenessRatio=5,
        speckleWindowSize=_SPECKLE * scale**2,
        speckleRange=scale,
        mode=cv2.STEREO_SGBM_MODE_SGBM_3WAY,
    )
    found = matcher.compute(views[0], views[1])[:, candidates:].astype(np.float32) / (16 * scale)
    if scale == 1:
        return np.maximum(found, 0)
    return _one_of_each_block(found.reshape(height, scale, width, scale))


def _one_of_each_block(blocks: np.ndarray) -> np.ndarray:
    """Mean f32[H,W] of the disparities f32[H,s,W,s] of each pixel's small ones (its centre lies between them).

    Of those that agree within a pixel, if they are most; 0 otherwise.
    """
    ordered = np.sort(blocks.transpose(1, 3, 0, 2).reshape(-1, blocks.shape[0], blocks.shape[2]), axis=0)
    count, result = len(ordered), np.zeros(ordered.shape[1:], np.float32)
    for size in range(min(_MIN_AGREEING, count), count + 1):
        for first in range(count - size + 1):
            group = ordered[first : first + size]
            agree = (group[0] > 0) & (group[-1] - group[0] < 1)
            result = np.where(agree, group.mean(0), result)
    return result


def _refine(left: np.ndarray, right: np.ndarray, disparity: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Disparity f32[H,W] moved towards the minimum of the window's squared difference.

    The two estimates are weighted by their variances: SGBM's, and that of a least-squares shift, the mean squared
    difference left over the sum of squared slopes. Around step edges, and where the step is larger than a pixel, SGBM's
    value stays.
    """
    first, second = _high_pass(left), _high_pass(right)
    slope_first = cv2.Sobel(first, cv2.CV_32F, 1, 0, ksize=1, scale=0.5, borderType=cv2.BORDER_REPLICATE)
    slope_second = cv2.Sobel(second, cv2.CV_32F, 1, 0, ksize=1, scale=0.5, borderType=cv2.BORDER_REPLICATE)
    kernel = np.ones((_REFINE_WINDOW, _REFINE_WINDOW), np.uint8)
    span = cv2.dilate(disparity, kernel) - cv2.erode(np.where(valid, disparity, -np.inf).astype(np.float32), kernel)
    movable = span < _FLAT_RANGE
    current, variance = disparity, np.full(disparity.shape, np.inf, np.float32)
    for _ in range(_REFINE_STEPS):
        smooth = np.where(movable, _window_mean(current), current)
        warped, slope_warped = _shift(second, smooth), _shift(slope_second, smooth)
        slope, difference = 0.5 * (slope_first + slope_warped), warped - first
        power = np.maximum(_window_mean(slope**2), 1e-3)
        moved = smooth + np.clip(_window_mean(difference * slope) / power, -0.5, 0.5)
        current = np.where(movable & (np.abs(moved - disparity) < 1), moved, disparity).astype(np.float32)
        # Neighbouring pixels are not independent: about every second one counts.
        variance = _window_mean(difference**2) / (0.5 * _REFINE_WINDOW**2 * power)
    return disparity + (current - disparity) * _SGBM_ERROR**2 / (_SGBM_ERROR**2 + variance)


def _high_pass(image: np.ndarray) -> np.ndarray:
    """Grey levels f32[H,W] less their neighbourhood's mean: exposure differs between eyes."""
    values = image.astype(np.float32)
    return values - cv2.blur(values, (31, 31), borderType=cv2.BORDER_REPLICATE)


def _window_mean(values: np.ndarray) -> np.ndarray:
    return cv2.blur(values, (_REFINE_WINDOW, _REFINE_WINDOW), borderType=cv2.BORDER_REPLICATE)


def _shift(image: np.ndarray, disparity: np.ndarray) -> np.ndarray:
    """`image` at columns x - disparity, Catmull-Rom; cv2.remap rounds positions to 1/32 px, too coarse far away."""
    width = image.shape[1]
    position = np.arange(width, dtype=np.float32) - disparity
    base = np.floor(position)
    f = (position - base).astype(np.float32)
    base = base.astype(np.int32)
    weights = (
        ((-0.5 * f + 1) * f - 0.5) * f,
        (1.5 * f - 2.5) * f * f + 1,
        ((-1.5 * f + 2) * f + 0.5) * f,
        (0.5 * f - 0.5) * f * f,
    )
    row_start = np.arange(image.shape[0], dtype=np.int32)[:, None] * width
    flat = image.ravel()
    total = np.zeros_like(image)
    for tap, weight in enumerate(weights, start=-1):
        total += weight * flat[row_start + np.clip(base + tap, 0, width - 1)]
    return total
