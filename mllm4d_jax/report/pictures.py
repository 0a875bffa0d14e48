"""Small frames of the clips that a page shows. A clip that cannot be read gives a note in their place."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.images import read_image
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.qa.errors import MediaError
from mllm4d_jax.qa.media_paths import Span, part_named
from mllm4d_jax.report import page

SIDE = 240  # pixels, the longer side of a small frame
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# A frame is reduced while its clip is decoded: four frames of an 8K clip would be 400 MB.
_REDUCED = ResizeRule("per_frame", 2, 2, 256, SIDE * SIDE)


@dataclass(frozen=True)
class Pictures:
    """Of one file: (JPEG file, caption) per frame, or why there are none."""

    frames: tuple[tuple[bytes, str], ...]
    note: str = ""


def _part(name: str) -> tuple[str, Span]:
    file, span = part_named(name)
    return file, span or (None, None)


def read_pictures(
    paths: Sequence[str], *, frames: int, max_bytes: int, clip_s: float, total_s: float
) -> dict[str, Pictures]:
    """Pictures of each file, every file read once; never raises because of a file.

    Args:
      paths: of images and videos; of parts of videos as `media_paths.named_part` calls them.
      frames: of a clip, evenly spaced, both ends included.
      max_bytes: of one picture.
      clip_s: seconds that a clip may take to decode.
      total_s: seconds after which no further clip is begun.
    """
    started = time.monotonic()

    def read(path: str) -> Pictures:
        if time.monotonic() - started > total_s:
            return Pictures((), f"{path} was not decoded: the {total_s:g} s for all pictures were used up")
        try:
            file, (start, end) = (path, (None, None)) if os.path.exists(path) else _part(path)
            if path.lower().endswith(_IMAGES):
                images, captions = [read_image(path)], ["image"]
            else:
                clip = pool.read(file, SampleRule("uniform", frames, None, start=start, end=end), _REDUCED)
                images, captions = clip.frames, [f"{t:.1f} s" for t in clip.times.tolist()]
            files = (page.thumbnail(image, max_side=SIDE, max_bytes=max_bytes) for image in images)
            return Pictures(tuple(zip(files, captions, strict=True)))
        except (MediaError, ValueError, OSError) as problem:
            return Pictures((), str(problem))

    wanted = list(dict.fromkeys(paths))
    with DecodePool(clip_s) as pool, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        return dict(zip(wanted, threads.map(read, wanted), strict=True))
