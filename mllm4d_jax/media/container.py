"""What a video file promises, read from its own structure where the decoder library does not tell.

For MP4 and QuickTime files the decoder reports the number of *stored* samples. That is not the number of frames that
come out: a clip cut without re-encoding stores frames before its first and after its last visible one and hides them
with an edit list. Reading the sample count, the edit list and the lengths of the top-level boxes tells such a healthy
clip from one whose tail is missing.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

_MAX_MOOV_BYTES = 256 << 20
_TOP_LEVEL = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


@dataclasses.dataclass(frozen=True)
class Promise:
    """What the file says about its video.

    Attributes:
      frames: frames that a complete decode shows; None where the file does not say exactly.
      damage: what is physically wrong, in words; "" when the file is whole as far as can be told.
    """

    frames: int | None
    damage: str


def read_promise(path: str) -> Promise:
    """Reads the structure of an MP4/QuickTime file; other containers give `Promise(None, "")`.

    Never raises on damaged content; an unreadable file raises OSError.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        if head[4:8] not in _TOP_LEVEL:
            return Promise(None, "")
        size = os.fstat(file.fileno()).st_size
        moov, damage = _walk(file, size)
    if moov is None:
        return Promise(None, damage or "it has no 'moov' box, so the recording was never finished")
    try:
        return Promise(_visible_frames(moov), damage)
    except (struct.error, ZeroDivisionError):
        return Promise(None, damage or "its 'moov' box is malformed")


def _walk(file: BinaryIO, size: int) -> tuple[bytes | None, str]:
    """Top-level boxes: (content of moov or None, damage)."""
    moov, start = None, 0
    while start + 8 <= size:
        file.seek(start)
        header = file.read(16)
        length, name = struct.unpack(">I4s", header[:8])
        skip = 8
        if length == 1 and len(header) == 16:
            length, skip = struct.unpack(">Q", header[8:])[0], 16
        elif length == 0:
            length = size - start
        if length < skip:
            return moov, f"box {name.decode('latin-1')!r} at byte {start} has length {length}"
        if start + length > size:
            missing = start + length - size
            return moov, f"the file ends inside box {name.decode('latin-1')!r}, {missing} bytes short"
        if name == b"moov" and length <= _MAX_MOOV_BYTES:
            file.seek(start + skip)
            moov = file.read(length - skip)
        start += length
    return moov, ""


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, content) of the boxes in `data`."""
    start = 0
    while start + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        skip = 8
        if length == 1:
            length, skip = struct.unpack_from(">Q", data, start + 8)[0], 16
        elif length == 0:
            length = len(data) - start
        if length < skip:
            return
        yield name, data[start + skip : start + length]
        start += length


def _find(data: bytes, *names: bytes) -> bytes | None:
    for name in names:
        data = next((content for found, content in _boxes(data) if found == name), None)
        if data is None:
            return None
    return data


def _visible_frames(moov: bytes) -> int | None:
    """Frames of the first video track after its edit list; None for fragmented or unusual files."""
    movie = _find(moov, b"mvhd")
    for name, track in _boxes(moov):
        handler = _find(track, b"mdia", b"hdlr") if name == b"trak" else None
        if movie is None or handler is None or handler[8:12] != b"vide":
            continue
        media, sizes = _find(track, b"mdia", b"mdhd"), _find(track, b"mdia", b"minf", b"stbl", b"stsz")
        if media is None or sizes is None:
            return None
        stored = struct.unpack_from(">I", sizes, 8)[0]
        media_scale, media_length = _timing(media)
        edits = _find(track, b"edts", b"elst")
        if edits is None or not stored or not media_length:
            return stored or None
        movie_scale, _ = _timing(movie)
        shown = [length for length, begin in _edits(edits) if begin >= 0]
        if 0 in shown:
            return stored
        seconds, sample_seconds = sum(shown) / movie_scale, media_length / media_scale / stored
        return min(stored, round(seconds / sample_seconds))
    return None


def _timing(box: bytes) -> tuple[int, int]:
    """(time scale, duration) of an mvhd or mdhd box."""
    return struct.unpack_from(">IQ", box, 20) if box[0] == 1 else struct.unpack_from(">II", box, 12)


def _edits(box: bytes) -> list[tuple[int, int]]:
    """(duration in movie time, start in media time) of each edit; start is -1 for an empty edit."""
    count = struct.unpack_from(">I", box, 4)[0]
    form, step = (">Qq", 20) if box[0] == 1 else (">Ii", 12)
    return [struct.unpack_from(form, box, 8 + i * step) for i in range(min(count, len(box) // step))]
