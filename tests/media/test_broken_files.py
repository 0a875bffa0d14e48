"""Videos with bytes changed, cut out, doubled or lost give sampled frames or a MediaError that names the file."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.qa.errors import MediaError
from tests.media.movies import write_movie

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
