"""What a run and the processes that it starts ask of buckets: requests, and bytes in both directions.

Each process writes its own totals into a file of a folder that an environment variable names. What TensorStore does for
checkpoints is not among them.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Self

_FOLDER = "MLLM4D_TRAFFIC"
_FORM = struct.Struct("<3Q")


class Total(NamedTuple):
    """Requests, bytes received and bytes sent."""

    requests: int = 0
    received: int = 0
    sent: int = 0


class Traffic:
    """Counts while the block runs. Use as a context manager, before other processes are started."""

    def __enter__(self) -> Self:
        self._held = tempfile.TemporaryDirectory(prefix="mllm4d-traffic-")
        os.environ[_FOLDER] = self._held.name
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(_FOLDER, None)
        self._held.cleanup()

    def total(self) -> Total:
        """Return what all processes have asked so far."""
        found = [_FORM.unpack(text) for file in Path(self._held.name).iterdir() if len(text := file.read_bytes()) == 24]
        return Total(*(sum(column) for column in zip(*found, strict=True))) if found else Total()

    def said(self, steps: int) -> str:
        """Return the total in words, for a run of so many steps; '' where no bucket was asked."""
        asked = self.total()
        per = f"; per 100 steps {100 * asked.requests / steps:,.0f} requests, {_mb(100 * asked.received / steps)}"
        text = f"buckets: {asked.requests:,} requests, {_mb(asked.received)} read, {_mb(asked.sent)} written"
        return text + per * (steps > 0) if asked.requests else ""


def counting() -> Any:
    """Return what makes an aiohttp session count its requests (`aiohttp.TraceConfig`)."""
    import aiohttp

    totals: dict[str, list[int]] = {}  # folder of a run -> its totals

    def add(requests: int, received: int, sent: int) -> None:
        folder = os.environ.get(_FOLDER)
        if folder is None:
            return
        mine = totals.setdefault(folder, [0, 0, 0])
        for n, more in enumerate((requests, received, sent)):
            mine[n] += more
        with contextlib.suppress(OSError):  # the run has ended
            # In place: a file that is truncated and written anew is empty for who reads it in between.
            file = os.open(f"{folder}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(file, _FORM.pack(*mine), 0)
            finally:
                os.close(file)

    async def ended(session: Any, context: Any, about: Any) -> None:
        add(1, about.response.content_length or 0, 0)

    async def failed(session: Any, context: Any, about: Any) -> None:
        add(1, 0, 0)

    async def sent(session: Any, context: Any, about: Any) -> None:
        add(0, 0, len(about.chunk))

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(ended)
    trace.on_request_exception.append(failed)
    trace.on_request_chunk_sent.append(sent)
    return trace


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
