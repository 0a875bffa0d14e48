"""Image files to RGB arrays with OpenCV, within limits that are checked before a pixel is decoded."""

from __future__ import annotations

import os

import cv2
import imagesize
import numpy as np

from mllm4d_jax.media.container import check_file
from mllm4d_jax.media.resize import ImageRule, SizeError, resize_bicubic
from mllm4d_jax.qa.errors import MediaError

MAX_BYTES = 256 << 20  # of the file
MAX_PIXELS = 1 << 28  # 805 MB as RGB; the largest phone cameras take 200 million


def read_image(path: str, resize: ImageRule | None = None) -> np.ndarray:
    """Return an image file as u8[H, W, 3] RGB, EXIF rotation applied.

    Transparency is dropped, not composited, like Pillow's `convert("RGB")` that the HF image processors use: the
    colours stored under transparent pixels show.

    Args:
      resize: size of the result; None keeps the image's.

    Raises:
      MediaError: "missing_file", "empty_file", "not_an_image", "too_large" (bytes or pixels), "bad_size".
    """
    check_file(path, "image")
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise MediaError(f"image {path} has {size:,} bytes, more than {MAX_BYTES:,}", "too_large")
    width, height = imagesize.get(path)
    if width < 1 or height < 1:
        raise MediaError(f"{path} is not an image (or a damaged one)", "not_an_image")
    if width * height > MAX_PIXELS:
        raise MediaError(f"image {path} has {width} x {height} pixels, more than {MAX_PIXELS:,}", "too_large")
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:  # larger than OpenCV's limit on pixels
        raise MediaError(f"{path} cannot be read as an image ({error.err or error})", "not_an_image") from error
    if image is None:
        raise MediaError(f"{path} is not an image (or a damaged one)", "not_an_image")
    image = image[..., ::-1]
    try:
        return image if resize is None else resize_bicubic(image, *resize.size(*image.shape[:2]))
    except SizeError as error:
        raise MediaError(f"{path}: {error}", "bad_size") from error
