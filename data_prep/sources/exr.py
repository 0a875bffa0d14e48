"""Reading OpenEXR pictures as OpenCV writes them: scan lines of 32- or 16-bit floats, plain or packed by zlib.

OpenCV's own reader is compiled out of its newer packages. Layout: openexr.com/en/latest/OpenEXRFileLayout.html.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from data_prep.store.untrusted import SceneError, read_bytes

MAX_EXR_BYTES = 2**30  # of the file, and of its pixels
MAX_SIDE = 1 << 14
_MAGIC = 20000630
_MOST_PER_BYTE = 1100  # deflate unpacks one byte into at most 1032
_DTYPES = {1: "<f2", 2: "<f4"}  # 0 is uint32
_LINES = {0: 1, 2: 1, 3: 16}  # scan lines in a chunk of each compression read here: none, ZIPS, ZIP
_OTHERS = {1: "RLE", 4: "PIZ", 5: "PXR24", 6: "B44", 7: "B44A", 8: "DWAA", 9: "DWAB"}


def read_exr(path: str | Path) -> dict[str, np.ndarray]:
    """Read the channels of an OpenEXR file by name, each f32[H, W] ("Y" for grey; "B", "G", "R").

    Every size is checked against the bytes that are there before anything is allocated.

    Raises:
      SceneError: unreadable, damaged, too large, or of a kind that is not read: tiles, several parts, deep or integer
        pixels, subsampled channels, a lossy or rarely used compression.
    """
    data = read_bytes(path, MAX_EXR_BYTES)
    try:
        return _decode(data)
    except SceneError as error:
        raise SceneError(f"{path}: {error}") from error
    except (struct.error, ValueError, zlib.error, IndexError, OverflowError) as error:
        raise SceneError(f"{path}: damaged or cut off ({type(error).__name__}: {error})") from error


def _decode(data: bytes) -> dict[str, np.ndarray]:
    magic, version = struct.unpack_from("<iI", data)
    if magic != _MAGIC:
        raise SceneError("not an OpenEXR file")
    if version & ~0x400 != 2:  # 0x400: long names; others: tiles, deep pixels, parts
        raise SceneError("tiles, deep pixels and several parts are not read; save plain scan lines, as MoGe does")
    attributes, position = _header(data, 8)
    try:
        channels = _channels(attributes["channels"])
        compression = attributes["compression"][0]
        left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"])
    except KeyError as error:
        raise SceneError(f"its header has no {error}") from error
    if compression not in _LINES:
        name = _OTHERS.get(compression, f"number {compression}")
        raise SceneError(f"packed by {name}; save it with ZIP, ZIPS or no compression, as MoGe does")
    width, height = right - left + 1, bottom - top + 1
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise SceneError(f"a data window of {width} x {height} pixels; sides must be within 1 to {MAX_SIDE}")
    line = np.dtype([(name, dtype, (width,)) for name, dtype in channels])
    if line.itemsize * height > min(MAX_EXR_BYTES, _MOST_PER_BYTE * len(data)):
        raise SceneError(f"{width} x {height} pixels of {len(channels)} channels are more than its bytes can hold")
    lines = np.zeros(height, line)
    step = _LINES[compression]
    done = set()
    for offset in np.frombuffer(data, "<u8", -(-height // step), position).tolist():
        y, size = struct.unpack_from("<ii", data, offset)
        first, packed = y - top, data[offset + 8 : offset + 8 + size]
        if first % step or not 0 <= first < height or first in done or not 0 <= size == len(packed):
            raise SceneError(f"the chunk at byte {offset} (line {y}, {size} bytes) cannot be")
        done.add(first)
        count = min(step, height - first)
        lines[first : first + count] = np.frombuffer(_unpack(packed, count * line.itemsize, compression), line)
    return {name: lines[name].astype(np.float32) for name, _ in channels}


def _header(data: bytes, position: int) -> tuple[dict[str, bytes], int]:
    """Attribute name -> its bytes, and where the offset table begins."""
    attributes: dict[str, bytes] = {}
    while data[position]:
        name, position = _text(data, position)
        _, position = _text(data, position)
        (size,) = struct.unpack_from("<i", data, position)
        position += 4 + size
        if size < 0 or position >= len(data):
            raise SceneError(f"its header ends within {name!r}")
        attributes[name] = data[position - size : position]
    return attributes, position + 1


def _channels(data: bytes) -> list[tuple[str, str]]:
    """(name, dtype) of each channel, in the order of the file."""
    found: dict[str, str] = {}
    position = 0
    while data[position]:
        name, position = _text(data, position)
        kind, _, across, down = struct.unpack_from("<iIii", data, position)
        position += 16
        if kind not in _DTYPES or (across, down) != (1, 1) or name in found:
            raise SceneError(f"channel {name!r} is no floating-point picture of full size")
        found[name] = _DTYPES[kind]
    if not found:
        raise SceneError("it has no channels")
    return list(found.items())


def _text(data: bytes, position: int) -> tuple[str, int]:
    end = data.index(b"\0", position, position + 256)
    return data[position:end].decode("latin-1"), end + 1


def _unpack(packed: bytes, size: int, compression: int) -> bytes:
    """The `size` bytes of a chunk. Packed ones hold differences of bytes, the even bytes before the odd ones."""
    if compression == 0 or len(packed) == size:  # what does not get smaller is stored as it is
        if len(packed) != size:
            raise SceneError(f"a chunk has {len(packed)} bytes for {size} bytes of pixels")
        return packed
    unzip = zlib.decompressobj()
    stepped = np.frombuffer(unzip.decompress(packed, size + 1), np.uint8).copy()
    if len(stepped) != size:
        raise SceneError(f"a chunk unpacks to another number of bytes than {size}")
    stepped[1:] -= np.uint8(128)
    halves = np.cumsum(stepped, dtype=np.uint8)
    pixels = np.empty(size, np.uint8)
    middle = (size + 1) // 2
    pixels[0::2], pixels[1::2] = halves[:middle], halves[middle:]
    return pixels.tobytes()
