"""Whether a video that was just written is all there."""

from __future__ import annotations

import errno
from pathlib import Path

from mllm4d_jax.files.storage import StorageError
from mllm4d_jax.media.video import probe
from mllm4d_jax.qa.errors import MediaError


def require_frames(path: str | Path, frames: int) -> None:
    """Look whether a video has all its frames: OpenCV's writer says nothing when the disk is full.

    Raises:
      StorageError: it has fewer than were written.
    """
    try:
        found = probe(str(path)).frames
    except MediaError:
        found = 0
    if found < frames:
        raise StorageError(errno.EIO, f"only {found} of {frames} frames were written; is the disk full?", str(path))
