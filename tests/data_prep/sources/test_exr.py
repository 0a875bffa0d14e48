"""OpenEXR pictures: a file that OpenCV wrote, files written here from the format's definition, and damaged ones."""

from __future__ import annotations

import base64
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.sources.exr import read_exr
from data_prep.store.untrusted import SceneError

# cv2.imwrite("depth.exr", depth, [cv2.IMWRITE_EXR_TYPE, cv2.IMWRITE_EXR_TYPE_FLOAT]) of OpenCV 4.12, as MoGe calls it,
# for depth = np.arange(35).reshape(5, 7) / 4 + 1 with depth[0, :3] = inf.
BY_OPENCV = (
    "di8xAQIAAABjaGFubmVscwBjaGxpc3QAEwAAAFkAAgAAAAAAAAABAAAAAQAAAABjb21wcmVzc2lvbgBjb21wcmVzc2lvbgABAAAAA2RhdGFXaW5k"
    "b3cAYm94MmkAEAAAAAAAAAAAAAAABgAAAAQAAABkaXNwbGF5V2luZG93AGJveDJpABAAAAAAAAAAAAAAAAYAAAAEAAAAbGluZU9yZGVyAGxpbmVP"
    "cmRlcgABAAAAAHBpeGVsQXNwZWN0UmF0aW8AZmxvYXQABAAAAAAAgD9zY3JlZW5XaW5kb3dDZW50ZXIAdjJmAAgAAAAAAAAAAAAAAHNjcmVlbldp"
    "bmRvd1dpZHRoAGZsb2F0AAQAAAAAAIA/AB0BAAAAAAAAAAAAAFwAAAB4nGNgAIOEBQ0NEwoWJGwIOOBwweCBwgcBBgaOHwIfJF4oPNC4YXDB4oTD"
    "AY8dARsiViQsyJhRMKGio6GhpaajoqdkQsGUnBkZ/xlBcL/jAQfS4EF7JAgA/jNBwg=="
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opencv_depth() -> np.ndarray:
    depth = np.arange(35, dtype=np.float32).reshape(5, 7) / 4 + 1
    depth[0, :3] = np.inf
    return depth


def attribute(name: bytes, kind: bytes, value: bytes) -> bytes:
    return name + b"\0" + kind + b"\0" + struct.pack("<i", len(value)) + value


def pack(raw: bytes) -> bytes:
    """ZIP of openexr.com: even bytes, then odd ones; each as the difference to the one before plus 128; zlib."""
    parts = raw[0::2] + raw[1::2]
    steps = bytes([parts[0], *((b - a + 128) % 256 for a, b in zip(parts, parts[1:], strict=False))])
    packed = zlib.compress(steps)
    return packed if len(packed) < len(raw) else raw


def exr_bytes(channels: dict[str, np.ndarray], compression: int = 3, backwards: bool = False, top: int = 0) -> bytes:
    """A scan-line file; `compression` 0, 2 or 3."""
    names = sorted(channels)
    height, width = channels[names[0]].shape
    kinds = {np.dtype("f2"): 1, np.dtype("f4"): 2}
    entries = b"".join(n.encode() + b"\0" + struct.pack("<iIii", kinds[channels[n].dtype], 0, 1, 1) for n in names)
    window = struct.pack("<4i", -2, top, width - 3, top + height - 1)
    header = struct.pack("<iI", 20000630, 2)
    header += attribute(b"channels", b"chlist", entries + b"\0")
    header += attribute(b"compression", b"compression", bytes([compression]))
    header += attribute(b"dataWindow", b"box2i", window) + attribute(b"lineOrder", b"lineOrder", bytes([backwards]))
    header += b"\0"
    step = 16 if compression == 3 else 1
    chunks = []
    for y in range(0, height, step):
        raw = b"".join(channels[n][row].tobytes() for row in range(y, min(y + step, height)) for n in names)
        packed = pack(raw) if compression else raw
        chunks.append((y, struct.pack("<ii", top + y, len(packed)) + packed))
    position, places, body = len(header) + 8 * len(chunks), {}, b""
    for y, chunk in reversed(chunks) if backwards else chunks:
        places[y] = position + len(body)
        body += chunk
    return header + b"".join(struct.pack("<Q", places[y]) for y in sorted(places)) + body


def test_a_file_of_opencv(tmp_path):
    path = tmp_path / "depth.exr"
    path.write_bytes(base64.b64decode(BY_OPENCV))
    read = read_exr(path)
    assert list(read) == ["Y"] and read["Y"].dtype == np.float32
    np.testing.assert_array_equal(read["Y"], opencv_depth())


@pytest.mark.parametrize("compression", [0, 2, 3])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (16, 5), (37, 9)])
def test_channels_come_back_to_the_bit(tmp_path, compression, backwards, shape):
    rng = np.random.default_rng(0)
    channels = {
        "R": (rng.integers(0, 5, shape) / 4).astype("f4"),
        "Y": rng.random(shape).astype("f4"),  # does not get smaller: stored as it is
        "A": (rng.integers(0, 5, shape) / 4).astype("f2"),
    }
    channels["R"][0, 0] = np.nan
    path = tmp_path / "a.exr"
    path.write_bytes(exr_bytes(channels, compression, backwards, top=-7))
    read = read_exr(path)
    assert list(read) == ["A", "R", "Y"]
    for name, array in channels.items():
        np.testing.assert_array_equal(read[name], array.astype("f4"))


def changed(**places: bytes) -> bytes:
    """A small good file with the value of an attribute replaced by another of the same length."""
    data = exr_bytes({"Y": opencv_depth()})
    for name, value in places.items():
        at = data.index(name.encode() + b"\0")
        at = data.index(b"\0", at + len(name) + 1) + 5
        data = data[:at] + value + data[at + len(value) :]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or cut off"),
        (b"\x89PNG....", "not an OpenEXR file"),
        (struct.pack("<iI", 20000630, 0x202), "tiles, deep pixels"),
        (changed(compression=bytes([4])), "packed by PIZ; save it with ZIP"),
        (changed(compression=bytes([77])), "packed by number 77"),
        (changed(dataWindow=struct.pack("<4i", 0, 0, -1, 4)), "0 x 5 pixels"),
        (changed(dataWindow=struct.pack("<4i", 0, 0, 99_999, 4)), "100000 x 5 pixels"),
        (changed(dataWindow=struct.pack("<4i", 0, 0, 16_000, 16_000)), "more than its bytes can hold"),
        (changed(dataWindow=struct.pack("<4i", 0, 0, 7, 4)), "another number of bytes"),
        (changed(dataWindow=struct.pack("<4i", 0, 0, 6, 24)), "another number of bytes"),
        (changed(channels=b"Y\0" + struct.pack("<iIii", 0, 0, 1, 1)), "no floating-point picture"),
        (changed(channels=b"Y\0" + struct.pack("<iIii", 2, 0, 2, 2)), "no floating-point picture"),
        (exr_bytes({"Y": opencv_depth()})[:-3], "cannot be"),
        (exr_bytes({"Y": opencv_depth()}).replace(b"dataWindow", b"dataWindoW"), "has no 'dataWindow'"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, data, message):
    path = tmp_path / "bad.exr"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(SceneError, match=message) as caught:
        read_exr(path)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert str(path) in str(caught.value)


@FUZZ
@given(
    compression=st.sampled_from([0, 2, 3]),
    cut=st.integers(0, 3000),
    flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 255)), max_size=4),
)
def test_damaged_bytes_are_an_error_or_a_picture(tmp_path, compression, cut, flips):
    data = bytearray(exr_bytes({"Y": opencv_depth(), "Z": opencv_depth().astype("f2")}, compression))
    for position, bits in flips:
        data[position % len(data)] ^= bits
    path = tmp_path / "damaged.exr"
    path.write_bytes(bytes(data[: cut % len(data)] if cut % 2 else data))
    try:
        read = read_exr(path)
    except SceneError as error:
        assert "damaged.exr" in str(error)
    else:
        assert all(array.dtype == np.float32 and array.ndim == 2 for array in read.values())
