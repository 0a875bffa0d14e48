"""Images within limits that hold before a pixel is decoded; decoders within limits of memory."""

from __future__ import annotations

import resource
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.images import read_image
from mllm4d_jax.media.resize import ImageRule, image_size, resize_bicubic
from mllm4d_jax.qa.errors import MediaError
from tests.media.movies import write_movie

RULE = ImageRule(32, 784, 50176)


def write_png(path: Path, width: int, height: int, rows: int) -> Path:
    """Write the first rows of a black one-channel PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress(bytes((width + 1) * rows), 9)
    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def peak_mib(pool: DecodePool) -> float:
    """Largest memory that the pool's only process had."""
    status = Path(f"/proc/{pool._idle[0].process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@pytest.fixture(scope="module")
def pool():
    with DecodePool(timeout_s=60.0) as p:
        yield p


def refusal(call, *args) -> MediaError:
    with pytest.raises(MediaError) as caught:
        call(*args)
    return caught.value


def test_a_large_image_in_a_small_file_is_refused_before_it_is_decoded(tmp_path):
    path = write_png(tmp_path / "bomb.png", 30_000, 30_000, rows=500)
    with DecodePool(timeout_s=60.0) as pool:
        error = refusal(pool.image, str(path), RULE)
        assert error.reason == "too_large" and "30000 x 30000" in str(error)
        assert peak_mib(pool) < 300
    assert refusal(read_image, str(path)).reason == "too_large"


def test_a_sparse_file_of_200_gb_is_a_bad_record(tmp_path, pool):
    path = tmp_path / "sparse.jpg"
    path.write_bytes(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    with open(path, "r+b") as file:
        file.truncate(200 << 30)
    error = refusal(pool.image, str(path), RULE)
    assert error.reason == "too_large" and "214,748,364,800 bytes" in str(error)
    with open(tmp_path / "zeros.mp4", "wb") as file:
        file.truncate(200 << 30)
    assert refusal(pool.read, str(tmp_path / "zeros.mp4"), SampleRule("uniform", 4, None)).reason == "not_a_video"


def test_a_header_that_lies_about_its_size_stays_within_the_limits(tmp_path, pool):
    """The size that is looked up is a thumbnail's, or a first chunk's that the decoder does not use."""
    data = bytearray(write_png(tmp_path / "a.png", 64, 64, rows=64).read_bytes())
    data[16:24] = struct.pack(">2I", 2**31 - 1, 2**31 - 1)
    (tmp_path / "lie.png").write_bytes(data)
    assert refusal(pool.image, str(tmp_path / "lie.png"), RULE).reason == "too_large"
    for kind in ("jpg", "png", "bmp", "webp", "tiff"):
        whole = cv2.imencode(f".{kind}", np.full((64, 64, 3), 90, np.uint8))[1].tobytes()
        rng = np.random.default_rng(0)
        for _ in range(100):
            data = bytearray(whole)
            for at in rng.integers(min(len(data), 200), size=3):
                data[at] = rng.integers(256)
            path = tmp_path / f"a.{kind}"
            path.write_bytes(data)
            try:
                assert pool.image(str(path), RULE).shape[-1] == 3
            except MediaError as error:
                assert path.name in str(error)


def test_images_through_the_pool_are_those_of_this_process(tmp_path, pool):
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    size = image_size(90, 130, 32, 784, 50176)
    np.testing.assert_array_equal(pool.image(str(tmp_path / "a.png"), RULE), resize_bicubic(image, *size))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="sets the limits of another process")
def test_a_video_that_needs_more_memory_than_its_decoder_may_use(tmp_path):
    small = write_movie(tmp_path / "small.mp4", [0, 0.1, 0.2, 0.3])
    large = write_movie(tmp_path / "large.mp4", [0, 0.1], "mpeg4", size=(4320, 7680), tick=Fraction(1, 25))
    rule = SampleRule("uniform", 4, None)
    with DecodePool(timeout_s=60.0) as pool:
        pool.read(small, rule)
        process = pool._idle[0].process
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_AS)
        assert soft == 4 << 30  # by itself
        used = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process.pid, resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
        error = refusal(pool.read, large, rule)
        assert error.reason == "out_of_memory" and "large.mp4" in str(error)
        assert len(pool.read(small, rule).frames) == 4 and pool._idle[0].process is process


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_of_the_codec_change_nothing(threads, tmp_path, pool):
    path = write_movie(tmp_path / "a.mp4", [k / 10 for k in range(30)], size=(240, 320))
    rule = SampleRule("uniform", 8, None)
    with DecodePool(timeout_s=60.0, threads=threads) as many:
        np.testing.assert_array_equal(many.read(path, rule).frames, pool.read(path, rule).frames)
