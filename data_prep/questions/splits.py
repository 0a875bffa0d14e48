"""Which split a source video belongs to. A function of its name: adding videos never moves another one."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "bench")


def fraction(seed: int, *names: str) -> float:
    """A number in [0, 1) that depends on seed and names alone, spread evenly."""
    text = "\0".join((str(seed), *names))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56


def split_of(source_id: str, *, bench_share: float, seed: int = 0) -> str:
    """The split, train or bench, of everything cut from a source video.

    Args:
      bench_share: expected share of source videos in "bench"; raising it only moves videos from train to bench.
      seed: keep it fixed for the life of a data set.

    Raises:
      ValueError: bench_share outside [0, 1].
    """
    if not 0 <= bench_share <= 1:
        raise ValueError(f"bench_share must be within 0 and 1, not {bench_share}")
    return "bench" if fraction(seed, "split", source_id) < bench_share else "train"
