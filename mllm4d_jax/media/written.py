"""Whether a video that was just written is all there."""

from __future__ import annotations

import errno
from pathlib import Path

import cv2

from mllm4d_jax.files.storage import StorageError


def require_frames(path: str | Path, frames: int) -> None:
    """Read a video back and count its frames: OpenCV's writer says nothing when the disk is full.

    Raises:
      StorageError: it has fewer than were written.
    """
    video, found = cv2.VideoCapture(str(path)), 0
    while video.grab():
        found += 1
    video.release()
    if found < frames:
        raise StorageError(errno.EIO, f"only {found} of {frames} frames were written; is the disk full?", str(path))
