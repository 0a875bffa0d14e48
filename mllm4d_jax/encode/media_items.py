"""The images and videos of a record, and when two records have the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import numpy as np

from mllm4d_jax.encode.chat import Visual
from mllm4d_jax.media.stored_frames import StoredFrames
from mllm4d_jax.qa.errors import PlaceholderError
from mllm4d_jax.qa.records import Record


@dataclasses.dataclass(frozen=True)
class MediaItem:
    """An image or video of a record. `frames` stay out (None) until the token budget is known to hold."""

    path: str
    visual: Visual
    seconds_per_grid: float = 0.0  # videos only
    frames: np.ndarray | None = None  # u8[T, H, W, 3], resized


@dataclasses.dataclass(frozen=True)
class Media:
    """The images and videos of a record as the model sees them.

    Attributes:
      items: one per image or video, without their frames.
      patches: f32[N, P], as in `Example`; read-only.
    """

    items: tuple[MediaItem, ...]
    patches: np.ndarray


class MediaCache(Protocol):
    """Where the encoder looks for media before it decodes them."""

    def get(self, identity: Hashable) -> Media | None: ...

    def put(self, identity: Hashable, media: Media) -> None: ...


def media_parts(record: Record) -> list[Mapping[str, Any]]:
    """The record's images and videos, in reading order. Raises PlaceholderError for one without a file or frames."""
    parts = [
        p for m in record.messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] != "text"
    ]
    for part in parts:
        if part["type"] == "video" and isinstance(part.get("frames"), StoredFrames):
            continue
        if not isinstance(part.get("path"), str) or not part["path"]:
            raise PlaceholderError(f"an {part['type']} part has no file: {dict(part)!r:.120}")
    return parts


def media_identity(record: Record) -> tuple[tuple[str, str], ...]:
    """(kind, path or name) of the record's media, in reading order: equal for records that share them all."""
    return tuple((p["type"], p["frames"].name if "frames" in p else p["path"]) for p in media_parts(record))
