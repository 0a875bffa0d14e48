"""Turned and mirrored videos show as a player shows them: questions are about what is left and right in them."""

from __future__ import annotations

import gc
import math
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.orientation import read_orientation
from mllm4d_jax.media.video import probe, read_video
from mllm4d_jax.qa.errors import MediaError

ALL = SampleRule("uniform", 10_000, None)
COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}
STORED = "RGBW"  # quarters of the picture, row by row
HEIGHT, WIDTH = 48, 64
# The matrix (a, b, c, d) puts the pixel at (x, y) to (a x + c y, b x + d y).
SHOWN = {
    (1, 0, 0, 1): "RGBW",
    (-1, 0, 0, 1): "GRWB",
    (1, 0, 0, -1): "BWRG",
    (-1, 0, 0, -1): "WBGR",
    (0, 1, -1, 0): "BRWG",
    (0, -1, 1, 0): "GWRB",
    (0, 1, 1, 0): "RBGW",
    (0, -1, -1, 0): "WGBR",
}


def picture() -> np.ndarray:
    quarters = np.array([COLOURS[c] for c in STORED], np.uint8).reshape(2, 2, 3)
    return quarters.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)


def quarters(image: np.ndarray) -> str:
    """The colours in the middles of the quarters, row by row."""
    height, width = image.shape[:2]
    middles = [image[y, x].astype(int) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join(min(COLOURS, key=lambda c: np.abs(middle - COLOURS[c]).sum()) for middle in middles)


def write(path, frames=4) -> str:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        file.mux(stream.encode(None))
    return str(path)


def with_matrix(path: str, matrix) -> str:
    """The same MP4 with this matrix in the header of its track."""
    a, b, c, d = (round(value * 65536) for value in matrix)
    data = bytearray(Path(path).read_bytes())
    struct.pack_into(">9i", data, data.find(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    Path(path).write_bytes(data)
    return path


def check(path: str, shown: str, turned: bool, frames: int = 4) -> None:
    clip, size = read_video(path, ALL), (WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH)
    assert clip.frames.shape == (frames, *size, 3) and (probe(path).height, probe(path).width) == size
    assert [quarters(frame) for frame in clip.frames] == [shown] * frames


@pytest.mark.parametrize("matrix", SHOWN)
def test_all_eight(matrix, tmp_path):
    check(with_matrix(write(tmp_path / "a.mp4"), matrix), SHOWN[matrix], turned=matrix[0] == 0)


@pytest.mark.parametrize("degrees", [0.5, -0.5, 90.5])
def test_nearly_straight_is_straight(degrees, tmp_path):
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    path = with_matrix(write(tmp_path / "a.mp4"), (cos, sin, -sin, cos))
    check(path, "BRWG" if degrees > 45 else "RGBW", turned=degrees > 45)


def test_a_matrix_may_stretch(tmp_path):
    check(with_matrix(write(tmp_path / "a.mp4"), (-2, 0, 0, 2)), "GRWB", turned=False)


@pytest.mark.parametrize(
    "matrix", [(0.866, 0.5, -0.5, 0.866), (1, 0.5, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 0)]
)
@pytest.mark.parametrize("call", [probe, lambda path: read_video(path, ALL)])
def test_askew_is_refused(matrix, call, tmp_path):
    path = with_matrix(write(tmp_path / "a.mp4"), matrix)
    with pytest.raises(MediaError, match="no quarter turn and no mirror of one") as caught:
        call(path)
    assert caught.value.reason == "bad_orientation" and path in str(caught.value)


def exif(orientation: int) -> bytes:
    """One frame as a JPEG file that says how the camera was held."""
    data = cv2.imencode(".jpg", picture()[..., ::-1])[1].tobytes()
    entry = struct.pack("<HHII", 0x0112, 3, 1, orientation)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


@pytest.mark.parametrize("orientation, shown", [(2, "GRWB"), (4, "BWRG"), (6, "BRWG"), (5, "RBGW")])
def test_frames_with_kinds_of_notes_that_pyav_cannot_name(orientation, shown, tmp_path):
    path = str(tmp_path / "a.avi")
    with av.open(path, "w") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for k in range(4):
            packet = av.Packet(exif(orientation))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, k, k, Fraction(1, 10)
            packet.is_keyframe = True
            file.mux(packet)
    check(path, shown, turned=orientation > 4)


def test_a_frame_is_let_go_at_once(tmp_path):
    """Looking at it makes no cycle of references: frames of 8K would pile up."""
    gc.disable()
    try:
        with av.open(with_matrix(write(tmp_path / "a.mp4"), (-1, 0, 0, 1))) as file:
            frame = next(file.decode(video=0))
            before = sys.getrefcount(frame)
            assert read_orientation(frame, "a.mp4").left_right and sys.getrefcount(frame) == before
    finally:
        gc.enable()


def rewritten(path: str, target, filters: dict[int, str]) -> str:
    """The packets of a video, from the k-th on passed through a filter; its codec says something from there on."""
    with av.open(path) as file, av.open(str(target), "w") as other:
        stream = file.streams.video[0]
        out = other.add_stream_from_template(stream)
        packets = [packet for packet in file.demux(stream) if packet.size]
        for n, start in enumerate(starts := sorted(filters)):
            end = starts[n + 1] if n + 1 < len(starts) else len(packets)
            chain = av.BitStreamFilterContext(filters[start], stream, out)
            for packet in [*packets[start:end], None]:
                for made in chain.filter(packet):
                    made.stream = out
                    other.mux(made)
    return str(target)


def test_what_a_codec_says_with_its_key_frames_stays_in_force(tmp_path):
    path = write(tmp_path / "a.mp4", frames=20)
    said = {0: "h264_metadata=display_orientation=insert:flip=horizontal"}
    check(rewritten(path, tmp_path / "b.mkv", said), "GRWB", turned=False, frames=20)


def test_a_clip_that_is_turned_on_its_way_is_refused(tmp_path):
    path = write(tmp_path / "a.mp4", frames=20)
    said = {0: "null", 12: "h264_metadata=display_orientation=insert:rotate=90"}
    with pytest.raises(MediaError, match="otherwise than the first one") as caught:
        read_video(rewritten(path, tmp_path / "b.mkv", said), ALL)
    assert caught.value.reason == "varying_size"
