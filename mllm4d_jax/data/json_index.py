"""Where each record of a JSON or JSONL file starts and ends, found in one pass without holding the file in memory.

The released SFT set is one JSON list of two million records. Elements are delimited with the C parser of the standard
library on a latin-1 view of the bytes: JSON's own syntax is ASCII, so in that view one character is one byte and a
character position is a file offset. A broken element costs only itself: the scan takes up again at the next place that
looks like the start of a record.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm4d_jax.qa.records import unread_fields

MOST_UNREAD = 1000
CHUNK = 8 << 20
# A cut at the end of the buffer is reported at most this far from it; an unterminated string at its opening quote.
_CUT_MARGIN = 64
_LONGEST_STRING = 4 << 20
_MEDIA_KEYS = ("video", "videos", "image", "images")
_SPAN_KEYS = ("video_start", "video_end")  # which part of a video is meant
_RECORD_KEYS = frozenset({*_MEDIA_KEYS, "conversations", "messages", "id", "solution", "system"})
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]+)"')
_BLANK = re.compile(r"[ \t\r\n]*")


class RecordFileError(ValueError):
    """The file as a whole cannot be used as a set of records."""


@dataclasses.dataclass(frozen=True)
class JsonIndex:
    """Byte spans of the records of a file.

    Attributes:
      path: the file.
      starts, ends: u64 offsets; record i is bytes [starts[i], ends[i]). A broken record has a span too: parsing it
        again gives its error. An empty span stands for a missing comma or a missing closing bracket.
      clips: i32 per record, equal for records that name the same media, numbered by first appearance. A record
        without media, or a broken one, has a number of its own.
      digest: sha256 of the file, hex.
      newlines: (offset, line breaks before it) pairs, one per chunk read, ascending.
      unread: name of a field that nothing reads (`records.unread_fields`) -> records that have it; of the first
        `MOST_UNREAD` such names.
    """

    path: Path
    starts: array
    ends: array
    clips: np.ndarray
    digest: str
    newlines: tuple[tuple[int, int], ...]
    unread: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, i: int) -> bytes:
        """The bytes of record i. Opens the file each time, so that an index can cross threads and processes."""
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return file.read(self.ends[i] - self.starts[i])

    def line_column(self, offset: int) -> tuple[int, int]:
        """Line and column, both from 1, of a byte offset."""
        near, count = self.newlines[bisect.bisect_right(self.newlines, (offset, 1 << 62)) - 1]
        with self.path.open("rb") as file:
            file.seek(near)
            before = file.read(offset - near)
            count += before.count(b"\n")
            last = before.rfind(b"\n")
            if last >= 0 or near == 0:
                return count + 1, len(before) - last
            return count + 1, offset - _line_start(file, near) + 1


def _line_start(file, offset: int) -> int:
    """Offset of the first byte of the line that holds `offset`, searching backwards."""
    step = 1 << 16
    while offset > 0:
        low = max(0, offset - step)
        file.seek(low)
        found = file.read(offset - low).rfind(b"\n")
        if found >= 0:
            return low + found + 1
        offset = low
    return 0


def build_index(path: str | Path, chunk: int = CHUNK, name: str = "") -> JsonIndex:
    """Indexes a JSON list or a JSONL file; which of the two is decided by the first character, not by the name.

    Args:
      path: the file.
      name: what messages call it, if not by its path.
      chunk: bytes read at a time (bounds the memory together with the longest record).

    Raises:
      RecordFileError: the file is missing, empty, or starts with neither `[` nor `{`.
    """
    path, name = Path(path), name or str(path)
    if not os.path.isfile(path):
        raise RecordFileError(f"{name}: no such file of records (set data.path)")
    with path.open("rb") as file:
        buffer = _Buffer(file, chunk)
        if buffer.text.startswith("\xef\xbb\xbf"):
            buffer.position = 3
        first = buffer.peek()
        if first == "[":
            spans = _array_spans(buffer)
        elif first == "{":
            spans = _line_spans(buffer)
        else:
            what = "is empty" if not first else f"starts with {first!r}"
            raise RecordFileError(f"{name}: {what}; expected a JSON list of records, or JSONL with one record a line")
        starts, ends, media = array("Q"), array("Q"), array("Q")
        unread: dict[str, int] = {}
        for start, end, value in spans:
            starts.append(start)
            ends.append(end)
            media.append(_media_hash(value, len(media)))
            _count_unread(value, unread)
        buffer.drain()
    unread = {name.encode("latin-1", "replace").decode("utf-8", "replace"): n for name, n in unread.items()}
    return JsonIndex(path, starts, ends, _numbered(media), buffer.sha.hexdigest(), tuple(buffer.newlines), unread)


def _count_unread(value: Any, counts: dict[str, int]) -> None:
    for name in unread_fields(value) if isinstance(value, dict) else ():
        if name in counts or len(counts) < MOST_UNREAD:
            counts[name] = counts.get(name, 0) + 1


def _media_hash(value: Any, number: int) -> int:
    """64 bits that stand for the media that a record names, files and parts of them; for itself when it names none.

    Names are compared as the file spells them: two spellings of one name only mean that these records are not grouped.
    Whoever groups by this must still compare the names (a collision of hashes is possible, though unlikely).
    """
    named = [value.get(key) for key in _MEDIA_KEYS] if isinstance(value, dict) else []
    said = repr([*named, *map(value.get, _SPAN_KEYS)] if any(named) else number)
    return int.from_bytes(hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _numbered(hashes: array) -> np.ndarray:
    """i32 numbers of equal values, in order of first appearance."""
    _, first, inverse = np.unique(np.frombuffer(hashes, np.uint64), return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int32)
    number[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return number[inverse]


class _Buffer:
    """A latin-1 window onto a file that grows at its end and is cut at its front."""

    def __init__(self, file, chunk: int) -> None:
        self._file, self._chunk = file, chunk
        self.text, self.base, self.position, self.eof = "", 0, 0, False
        self.sha, self._read, self._lines = hashlib.sha256(), 0, 0
        self.newlines: list[tuple[int, int]] = [(0, 0)]
        self.fill()

    def fill(self) -> bool:
        """Drops what was consumed and reads one more chunk; False at the end of the file."""
        data = self._file.read(self._chunk)
        if not data:
            self.eof = True
            return False
        self.sha.update(data)
        self._read += len(data)
        self._lines += data.count(b"\n")
        self.newlines.append((self._read, self._lines))
        self.text = self.text[self.position :] + data.decode("latin-1")
        self.base, self.position = self.base + self.position, 0
        return True

    def peek(self) -> str:
        """The next character that is not white space, '' at the end; the position moves onto it."""
        while True:
            self.position = _BLANK.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.fill():
                return ""

    def drain(self) -> None:
        """Reads to the end, so that the digest covers the whole file."""
        self.position = len(self.text)
        while self.fill():
            self.position = len(self.text)

    @property
    def offset(self) -> int:
        return self.base + self.position


def _array_spans(buffer: _Buffer) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of the elements of a JSON list whose `[` is next in the buffer; value None when broken.

    Texts of the value are in the latin-1 view.
    """
    first_keys = set(_RECORD_KEYS)
    buffer.position += 1
    if buffer.peek() == "]":
        buffer.position += 1
        yield from _after_the_list(buffer)
        return
    while True:
        buffer.peek()
        start = buffer.offset
        whole, value = _element(buffer)
        if whole:
            key = _FIRST_KEY.match(buffer.text, start - buffer.base)
            if key:
                first_keys.add(key.group(1))
        else:
            _resynchronise(buffer, first_keys)
        yield start, buffer.offset, value
        following = buffer.peek()
        if following == ",":
            buffer.position += 1
            if buffer.peek() == "]":  # a comma with nothing after it
                yield buffer.offset, buffer.offset, None
                following = "]"
        elif following == "{" or (following == "" and whole):  # a comma or the closing bracket is missing
            yield buffer.offset, buffer.offset, None
        if following == "]":
            buffer.position += 1
            yield from _after_the_list(buffer)
        if following in ("]", ""):
            return


def _after_the_list(buffer: _Buffer) -> Iterator[tuple[int, int, None]]:
    """One broken span when something follows the closing bracket."""
    if buffer.peek():
        start = buffer.offset
        buffer.drain()
        yield start, buffer.base + len(buffer.text), None


def _element(buffer: _Buffer) -> tuple[bool, Any]:
    """Moves past one element; (True, its value), or (False, None) with the position unchanged when it is not JSON."""
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(buffer.text, buffer.position)
        except json.JSONDecodeError as error:
            margin = _LONGEST_STRING if error.msg.startswith("Unterminated") else _CUT_MARGIN
            if len(buffer.text) - error.pos > margin or buffer.eof or not buffer.fill():
                return False, None
            continue
        except (ValueError, RecursionError):  # integers of thousands of digits; absurd nesting
            return False, None
        # A bare number at the very end of the window may go on in the next chunk.
        if end == len(buffer.text) and not buffer.eof and buffer.fill():
            continue
        buffer.position = end
        return True, value


def _resynchronise(buffer: _Buffer, first_keys: set[str]) -> None:
    """Moves past a bad element: to the comma before the next object that opens with a known first key.

    Without one, the bad element takes the rest of the file (less the closing bracket).
    """
    names = "|".join(re.escape(k) for k in sorted(first_keys))
    opening = re.compile(r",[ \t\r\n]*\{[ \t\r\n]*\"(?:" + names + r')"[ \t\r\n]*:')
    search_from = buffer.position + 1
    while True:
        found = opening.search(buffer.text, search_from)
        if found:
            buffer.position = found.start()
            return
        # A start that straddles two chunks is caught by looking again at the last few characters.
        buffer.position = max(buffer.position, len(buffer.text) - 4096)
        if not buffer.fill():
            tail = buffer.text.rstrip()
            buffer.position = len(tail) - 1 if tail.endswith("]") else len(tail)
            return
        search_from = 0


def _line_spans(buffer: _Buffer) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of the lines that are not blank, without their line break; as in `_array_spans`."""
    while True:
        if not buffer.peek():
            return
        end = buffer.text.find("\n", buffer.position)
        while end < 0 and buffer.fill():
            end = buffer.text.find("\n", buffer.position)
        end = len(buffer.text) if end < 0 else end
        start, line = buffer.offset, buffer.text[buffer.position : end]
        buffer.position = end
        yield start, buffer.offset, _value(line)


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
