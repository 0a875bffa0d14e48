"""Videos with bytes changed, cut out, doubled or lost give sampled frames or a MediaError that names the file."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.video import read_video
from mllm4d_jax.qa.errors import MediaError
from tests.media.movies import damage, write_movie

FOUR = SampleRule("uniform", 4, None)
KINDS = {
    "mp4": ("libx264", "yuv420p"),
    "mov": ("prores_ks", "yuva444p10le"),
    "mkv": ("libx264", "yuv420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "avi": ("mpeg4", "yuv420p"),
    "ts": ("libx264", "yuv420p"),
    "mpg": ("mpeg2video", "yuv420p"),
    "flv": ("libx264", "yuv420p"),
    "wmv": ("wmv2", "yuv420p"),
    "ogv": ("libvpx", "yuv420p"),
    "apng": ("apng", "rgb24"),
    "mxf": ("mpeg2video", "yuv420p"),
    "nut": ("ffv1", "yuv420p"),
    "gif": ("gif", "rgb8"),
    "ivf": ("libvpx-vp9", "yuv420p"),
}
EXTREMES = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1", b"\0\0\1\0"]


def mutated(rng: np.random.Generator, whole: bytes) -> bytes:
    """Change a file as bad disks, cut downloads and people do; more often near its ends, where the headers are."""
    data = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        far = int(rng.integers(len(data) + 1)) if rng.random() < 0.5 else min(int(rng.integers(600)), len(data))
        at = far if rng.random() < 0.7 else len(data) - far
        kind = rng.integers(6)
        if kind <= 1:
            for near in range(at, min(at + int(rng.integers(1, 4)), len(data))):
                data[near] = rng.integers(256)
        elif kind == 2:
            field = EXTREMES[rng.integers(len(EXTREMES))]
            data[at : at + 4] = field[: len(data) - at]
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 64))]
        elif kind == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 64))]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def read_mutations(pool: DecodePool, path: Path, codec: str, pixels: str, count: int, seed: int) -> Counter:
    """Return how often each reason was given; "used" where frames came."""
    write_movie(path, [k / 25 for k in range(6)], codec, pixels, tick=Fraction(1, 25))
    whole, rng, reasons = path.read_bytes(), np.random.default_rng(seed), Counter()
    assert len(pool.read(str(path), FOUR).frames) == 4
    for _ in range(count):
        path.write_bytes(mutated(rng, whole))
        try:
            clip = pool.read(str(path), FOUR)
        except MediaError as error:
            assert path.name in str(error) and error.reason
            reasons[error.reason] += 1
            continue
        assert 2 <= len(clip.frames) == len(clip.indices) == len(clip.times) <= 4
        assert np.isfinite(clip.times).all() and (np.diff(clip.times) > 0).all() and (np.diff(clip.indices) > 0).all()
        assert np.isfinite(clip.source_fps) and clip.source_fps > 0
        reasons["used"] += 1
    return reasons


@pytest.fixture(scope="module")
def pool():
    with DecodePool(timeout_s=20.0) as p:
        yield p


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind, pool, tmp_path):
    assert read_mutations(pool, tmp_path / f"a.{kind}", *KINDS[kind], count=60, seed=0).total() == 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_thousand_mutations(kind, pool, tmp_path):
    reasons = read_mutations(pool, tmp_path / f"a.{kind}", *KINDS[kind], count=20_000, seed=1)
    print(kind, dict(reasons.most_common()))


def thirty(path, codec="libx264", b_frames=0) -> str:
    """A clip with a key frame every 12 frames, 25 a second."""
    times, options = [k / 25 for k in range(30)], {"g": "12"} | ({"sc_threshold": "0"} if codec == "libx264" else {})
    return write_movie(path, times, codec, tick=Fraction(1, 25), options=options, b_frames=b_frames)


def zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def scrambled(data: bytes) -> bytes:
    return bytes(data[:4]) + bytes((7 * value + 13) % 256 for value in data[4:])


def refused(path: str, what: str) -> re.Match:
    with pytest.raises(MediaError) as caught:
        read_video(path, FOUR)
    assert caught.value.reason == "truncated_video"
    found = re.fullmatch(re.escape(path) + " is truncated or damaged: " + what, caught.value.message)
    assert found, caught.value.message
    return found


HOLE = r"its frames (\d+) to (\d+) of 30, from (\d\.\d\d) to (\d\.\d\d) s, cannot be decoded"
HOLES = [("a.mp4", "libx264", 0, zeroed), ("b.mp4", "libx264", 2, zeroed), ("b.mp4", "libx264", 2, scrambled)]
HOLES += [("c.mkv", "libx264", 0, scrambled), ("d.mp4", "libvpx-vp9", 0, zeroed)]


@pytest.mark.parametrize("name, codec, b_frames, change", HOLES)
def test_a_hole_in_the_middle_is_found_and_named(name, codec, b_frames, change, tmp_path):
    """Up to the next key frame, or further where it is one of those that are lost."""
    found = refused(damage(thirty(tmp_path / name, codec, b_frames), slice(10, 14), change), HOLE)
    first, last = int(found[1]), int(found[2])
    assert 8 <= first <= 12 <= last <= 24
    assert (float(found[3]), float(found[4])) == pytest.approx((first / 25, last / 25), abs=0.006)


def test_lost_frames_of_a_file_without_times_of_its_own_are_counted(tmp_path):
    refused(damage(thirty(tmp_path / "a.avi", "mpeg4"), slice(5, 9), zeroed), "4 of its 30 frames cannot be decoded")


def test_two_frames_in_a_row_may_be_lost_and_not_three(tmp_path):
    clip = read_video(damage(thirty(tmp_path / "a.mp4"), slice(5, 7), zeroed), SampleRule("uniform", 30, None))
    assert clip.total_frames == 28 and np.diff(clip.times).max() == pytest.approx(3 / 25)
    found = refused(damage(thirty(tmp_path / "b.mp4"), slice(5, 8), zeroed), HOLE)
    assert found.groups() == ("5", "7", "0.20", "0.28")


def test_a_damaged_start_is_no_cut_between_key_frames(tmp_path):
    path = thirty(tmp_path / "a.mp4")
    with av.open(path) as file, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(file.streams.video[0])
        for packet in list(file.demux(video=0))[5:]:
            packet.stream = stream
            cut.mux(packet)
    assert read_video(str(tmp_path / "cut.mp4"), FOUR).total_frames == 18
    assert refused(damage(path, slice(0, 3), zeroed), HOLE).groups() == ("0", "11", "0.00", "0.44")


def test_a_gif_ends_with_its_trailer(tmp_path):
    path = Path(write_movie(tmp_path / "a.gif", [k / 10 for k in range(20)], "gif", "rgb8"))
    whole = path.read_bytes()
    for data in (whole, whole + b"made by hand"):
        path.write_bytes(data)
        assert read_video(str(path), FOUR).total_frames == 20
    for end in (-1, len(whole) * 3 // 5, len(whole) // 2):
        path.write_bytes(whole[:end])
        with pytest.raises(MediaError, match="the block is missing that ends a GIF") as caught:
            read_video(str(path), FOUR)
        assert caught.value.reason == "truncated_video"
