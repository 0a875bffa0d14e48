"""Few static shapes: the sizes that a step of rows is padded to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mllm4d_jax.rows.rows import RowSizes


class BucketError(ValueError):
    """The bucket lists cannot work."""


def bucket(n: int, per_octave: int) -> int:
    """The smallest allowed size >= n, where each power of two up to the next is divided into `per_octave` steps."""
    if n <= per_octave:
        return n
    step = max(1, (1 << (n - 1).bit_length() - 1) // per_octave)
    return -(-n // step) * step


def largest(sizes: Sequence[RowSizes]) -> RowSizes:
    """The sizes that hold each of several (those of all hosts, say)."""
    return RowSizes(**{f.name: max(getattr(s, f.name) for s in sizes) for f in dataclasses.fields(RowSizes)})


@dataclasses.dataclass(frozen=True)
class RowBuckets:
    """Needed sizes -> padded sizes: a pure function, so that hosts that agree on one agree on the other.

    Every shape is a compilation, minutes of it for a large model, so sizes are coarse where padding is cheap: frames go
    up to the next power of two and patches per frame by at most half (the vision tower is a small part of a step), and
    short lists of supervised tokens grow in steps of four. Slots go up by at most a quarter. What a full step needs is
    given as `full_*` and costs no padding; frames and patches that come near it (within an eighth) are made it.

    Attributes:
      prefix, length: allowed sizes of a row's prefix region and of a branch slot, ascending; beyond the last one, its
        multiples.
      merge_area: patches per merged token.
      full_slots: branch slots of a full row.
      full_frames: frames of the vision tower for a full row.
      full_frame_patches: patches of the largest frame, 0 when there is no limit.
    """

    prefix: tuple[int, ...]
    length: tuple[int, ...]
    merge_area: int = 4
    full_slots: int = 1
    full_frames: int = 0
    full_frame_patches: int = 0

    def __post_init__(self) -> None:
        for name, sizes in (("prefix", self.prefix), ("branch", self.length)):
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise BucketError(f"the {name} buckets must be positive, ascending and not empty, got {list(sizes)}")

    def sizes(self, needed: RowSizes) -> RowSizes:
        """What `needed` is padded to."""
        frames = frame_patches = 0
        if needed.frames:
            frames = _snap(needed.frames, 1, self.full_frames, near=True)
            area = self.merge_area
            most = self.full_frame_patches // area
            frame_patches = area * _snap(-(-needed.frame_patches // area), 2, most, near=True)
        return RowSizes(
            prefix=_listed(needed.prefix, self.prefix),
            slots=_snap(needed.slots, 4, self.full_slots),
            length=_listed(needed.length, self.length),
            frames=frames,
            frame_patches=frame_patches,
            supervised=_supervised(needed.supervised),
        )


def _listed(n: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if size >= n), -(-n // sizes[-1]) * sizes[-1])


def _supervised(n: int) -> int:
    return next((size for size in (16, 64, 256, 1024) if size >= n), bucket(n, 2))


def _snap(n: int, per_octave: int, full: int, near: bool = False) -> int:
    size = bucket(n, per_octave)
    return full if n <= full and (full < size or near and full <= 1.125 * size) else size
