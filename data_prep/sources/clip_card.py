"""`<clip>-clip.json`: what a clip's own files cannot tell about it. All fields may be left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import SceneError
from data_prep.scenes.objects import read_json

_FIELDS = ("source_id", "fov_degrees", "intrinsics", "baseline", "frame_size")


@dataclasses.dataclass(frozen=True, eq=False)
class ClipCard:
    """What is known of a clip.

    Attributes:
      source_id: the video that it was cut from; clips of one source video never get into both splits.
      fov_degrees: horizontal field of view; None if unknown.
      intrinsics: f64[3,3] pixels of one eye's frame; None if unknown.
      baseline: metres between the eyes; None if unknown.
      frame_size: (height, width) of the frames that an external tool was given; None = those of the video.
    """

    source_id: str
    fov_degrees: float | None = None
    intrinsics: np.ndarray | None = None
    baseline: float | None = None
    frame_size: tuple[int, int] | None = None


def read_card(path: str | Path, stem: str) -> ClipCard:
    """The card at `path`; without a file, that of a clip `stem` which is a source video of its own.

    Raises:
      SceneError: not a JSON object, an unknown field, or a value that cannot be; naming file and field.
    """
    path = Path(path)
    fields = read_json(path) if path.exists() else {}
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise SceneError(f"{path}: unknown field {unknown[0]!r}; there are {', '.join(_FIELDS)}")
    source = fields.get("source_id", stem)
    if not isinstance(source, str) or not source.strip():
        raise SceneError(f"{path}: source_id must be a text that is not empty, not {source!r:.80}")
    for name in ("fov_degrees", "baseline"):
        if name in fields and not (_is_number(fields[name]) and 0 < fields[name] < 1000):
            raise SceneError(f"{path}: {name} must be a number above 0, not {fields[name]!r:.80}")
    size = fields.get("frame_size")
    if size is not None and not (_is_list(size, 2) and all(type(n) is int and 0 < n < 2**16 for n in size)):
        raise SceneError(f"{path}: frame_size must be [height, width], not {size!r:.80}")
    return ClipCard(
        source_id=source,
        fov_degrees=fields.get("fov_degrees"),
        intrinsics=_matrix(path, fields.get("intrinsics")),
        baseline=fields.get("baseline"),
        frame_size=None if size is None else (size[0], size[1]),
    )


def _matrix(path: Path, value: Any) -> np.ndarray | None:
    if value is None:
        return None
    rows = _is_list(value, 3) and all(_is_list(row, 3) and all(map(_is_number, row)) for row in value)
    if not rows or value[2] != [0, 0, 1] or min(value[0][0], value[1][1]) <= 0:
        raise SceneError(
            f"{path}: intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels, not {value!r:.80}"
        )
    return np.array(value, np.float64)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9
