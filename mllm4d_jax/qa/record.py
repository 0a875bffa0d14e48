"""What a record is once its file's layout does not matter any more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation, media paths already resolved.

    Attributes:
      key: "file.json#17"; every error about the record names it.
      messages: {"role": "system"|"user"|"assistant", "content": str or a list of parts}; a part is
        {"type": "text", "text": str}, {"type": "video", "path": str}, {"type": "video", "frames":
        stored_frames.StoredFrames} (frames that came with the record) or {"type": "image", "path": str}.
      solution: the record's field of that name as the file has it, None without one; rewards read it (`qa/rewards.py`).
    """

    key: str
    messages: tuple[Mapping[str, Any], ...]
    solution: Any = None
