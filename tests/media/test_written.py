"""A video of which the disk took a part only is found when it is written."""

from __future__ import annotations

import os

import pytest

from mllm4d_jax.files.storage import StorageError
from mllm4d_jax.media.written import require_frames


def test_a_video_that_is_not_all_there_is_named(make_video, tmp_path):
    path = make_video(tmp_path / "a.mp4", 12)
    require_frames(path, 12)
    with pytest.raises(StorageError, match="a.mp4: only 12 of 13 frames were written; is the disk full?"):
        require_frames(path, 13)
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(StorageError, match="only 0 of 12 frames"):
        require_frames(path, 12)
