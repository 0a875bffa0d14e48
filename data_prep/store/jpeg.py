"""Frames as JPEG files."""

from __future__ import annotations

import cv2
import numpy as np


def encode_jpeg(frame: np.ndarray, quality: int = 95) -> bytes:
    """JPEG file of a frame u8[H, W, 3] RGB; `quality` 1-100. Raises ValueError for anything else."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size or not 1 <= quality <= 100:
        raise ValueError(f"cannot encode {frame.dtype}{list(frame.shape)} as JPEG of quality {quality}")
    ok, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ValueError(f"a frame of shape {list(frame.shape)} cannot be encoded as JPEG")
    return data.tobytes()
