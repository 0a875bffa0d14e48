"""What a run and the processes that it starts ask of buckets: requests, and bytes in both directions.

Each process writes its own totals into a file of a folder that an environment variable names. TensorStore, which Orbax
writes arrays of checkpoints with, has connections of its own, and counts for itself what goes over them.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Self

_FOLDER = "MLLM4D_TRAFFIC"
_FORM = struct.Struct("<3Q")
_HTTP = "/tensorstore/http/"  # metrics of all its buckets, and of the requests for credentials


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
        self._before = _tensorstore()
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(_FOLDER, None)
        self._held.cleanup()

    def total(self) -> Total:
        """Return what all processes have asked so far; of TensorStore's, those of this one."""
        found = [_FORM.unpack(text) for file in Path(self._held.name).iterdir() if len(text := file.read_bytes()) == 24]
        arrays = [now - before for now, before in zip(_tensorstore(), self._before, strict=True)]
        return Total(*(sum(column) for column in zip(*found, arrays, strict=True)))

    def said(self, steps: int) -> str:
        """Return the total in words, for a run of so many steps; '' where no bucket was asked."""
        asked, per = self.total(), ""
        if steps:
            per = f"; per 100 steps {100 * asked.requests / steps:,.0f} requests, {_mb(100 * asked.received / steps)}"
        text = f"buckets: {asked.requests:,} requests, {_mb(asked.received)} read, {_mb(asked.sent)} written"
        return text + per if asked.requests else ""


def _tensorstore() -> Total:
    """Return what TensorStore has asked of buckets in this process; nothing where it was never imported."""
    module = sys.modules.get("tensorstore")
    if module is None:
        return Total()
    found = dict.fromkeys(Total._fields, 0)
    named = {"request_started": "requests", "response_bytes": "received", "request_bytes": "sent"}
    for metric in module.experimental_collect_matching_metrics(_HTTP):
        column = named.get(metric["name"].removeprefix(_HTTP))
        for value in metric["values"] if column else ():
            found[column] += round(value["mean"] * value["count"] if "mean" in value else value["value"])
    return Total(**found)


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
