"""What rows must know of the model, its processor and the run: one object for loader, actor, evaluation and plan.

Every shape is a compilation, minutes of it for a large model, so rows are padded to few sizes. A plan asks the same
object as a run, so it compiles the shapes that the run uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.rows.rows import Group, RowBatch, RowSizes, collate_rows, needed_sizes


class RowShapeError(ValueError):
    """The lists of allowed lengths cannot work."""


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Layout and padding of rows: a pure function of its fields, so that hosts that agree on one agree on the other.

    Sizes are coarse where padding is cheap: frames go up to the next power of two and patches per frame by at most half
    (the vision tower is a small part of a step), and short lists of supervised tokens grow in steps of four. Slots go
    up by at most a quarter. What a full row needs costs no padding; frames and patches that come near it (within an
    eighth) are made it.

    Attributes:
      geometry: of the vision tower.
      visual_token_ids: image and video placeholder ids.
      patch_dim: numbers per patch.
      prefix_lengths, branch_lengths: allowed sizes of a row's prefix region and of a branch slot in tokens, ascending;
        beyond the last one, its multiples.
      clip_frames: temporal patches of the longest clip, 0 without a limit.
      frame_patches: patches of the largest frame of such a clip, 0 without a limit.
      clips: clips of a full row.
      branches: branches of each of them.
    """

    geometry: VisionGeometry
    visual_token_ids: tuple[int, ...]
    patch_dim: int
    prefix_lengths: tuple[int, ...]
    branch_lengths: tuple[int, ...]
    clip_frames: int = 0
    frame_patches: int = 0
    clips: int = 1
    branches: int = 1

    def __post_init__(self) -> None:
        for name, sizes in (("prefix", self.prefix_lengths), ("branch", self.branch_lengths)):
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise RowShapeError(f"the {name} buckets must be positive, ascending and not empty, got {list(sizes)}")

    @classmethod
    def of(
        cls,
        processor: ProcessorConfig,
        geometry: VisionGeometry,
        video: VideoOptions,
        *,
        prefix_lengths: Sequence[int],
        branch_lengths: Sequence[int],
        clips: int = 1,
        branches: int = 1,
    ) -> Self:
        """Return the shape of rows about clips that are encoded like this. Raises RowShapeError.

        Args:
          processor: of the model folder.
          geometry: of its vision tower.
          video: frames and pixels of a clip.
          prefix_lengths, branch_lengths, clips, branches: see the attributes.
        """
        p, frames = processor, video.num_frames or 0
        area = video.resize_for(processor).largest_frame(frames) if frames else 0
        return cls(
            geometry=geometry,
            visual_token_ids=(p.image_token_id, p.video_token_id),
            patch_dim=3 * p.temporal_patch_size * p.patch_size**2,
            prefix_lengths=tuple(prefix_lengths),
            branch_lengths=tuple(branch_lengths),
            clip_frames=-(-frames // p.temporal_patch_size),
            frame_patches=area // p.patch_size**2,
            clips=clips,
            branches=branches,
        )

    @property
    def merge_area(self) -> int:
        """Patches per decoder token."""
        return self.geometry.merge_size**2

    def needed(self, rows: Sequence[Sequence[Group]]) -> RowSizes:
        """Return the smallest sizes that hold the groups of each row, with branch slots of an allowed length."""
        return needed_sizes(rows, self.geometry, self.branch_lengths)

    def sizes(self, needed: RowSizes) -> RowSizes:
        """Return what `needed` is padded to."""
        frames = frame_patches = 0
        if needed.frames:
            frames = _snap(needed.frames, 1, self.clips * self.clip_frames, near=True)
            tokens, most = -(-needed.frame_patches // self.merge_area), self.frame_patches // self.merge_area
            frame_patches = self.merge_area * _snap(tokens, 2, most, near=True)
        return RowSizes(
            prefix=_listed(needed.prefix, self.prefix_lengths),
            slots=_snap(needed.slots, 4, self.clips * self.branches),
            length=_listed(needed.length, self.branch_lengths),
            frames=frames,
            frame_patches=frame_patches,
            supervised=next((n for n in (16, 64, 256, 1024) if n >= needed.supervised), bucket(needed.supervised, 2)),
            packed=bool(needed.packed) or self.clips > 1,
        )

    def largest(self, prefix: int, branch: int, answer: int, frame_patches: int | None = None) -> RowSizes:
        """Return the padded sizes of a full row: every clip as long and as large as it can be, with all its branches.

        Args:
          prefix: tokens of a clip's prefix; branch: of each branch; answer: supervised ones of each.
          frame_patches: of the largest frame, where something else than the resize rule bounds it.
        """
        slots = self.clips * self.branches
        frames, area = self.clips * self.clip_frames, self.frame_patches if frame_patches is None else frame_patches
        packed = self.clips > 1
        return self.sizes(RowSizes(self.clips * prefix, slots, branch, frames, area, slots * answer, packed))

    def completion_sizes(self, longest: int, entries: int) -> tuple[int, int]:
        """Return the padded (tokens of a completion, tokens of a row's completions)."""
        sizes = self.sizes(RowSizes(1, 1, longest, 0, 0, entries))
        return sizes.length, sizes.supervised

    def collate(
        self, rows: Sequence[Sequence[Group]], sizes: RowSizes | None = None, packed_length: int | None = None
    ) -> RowBatch:
        """Lay groups out as rows; see `rows.collate_rows`.

        Args:
          sizes: padded sizes that all hosts agreed on; None for what these rows need, padded.
          packed_length: slot length of `needed`, where `sizes` were made for more rows than these.
        """
        if sizes is None:
            needed = self.needed(rows)
            sizes, packed_length = self.sizes(needed), needed.length
        ids, dim, length = self.visual_token_ids, self.patch_dim, packed_length
        return collate_rows(rows, sizes, self.geometry, visual_token_ids=ids, patch_dim=dim, packed_length=length)


def bucket(n: int, per_octave: int) -> int:
    """Return the smallest allowed size >= n, where each power of two up to the next has `per_octave` steps."""
    if n <= per_octave:
        return n
    step = max(1, (1 << (n - 1).bit_length() - 1) // per_octave)
    return -(-n // step) * step


def _listed(n: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if size >= n), -(-n // sizes[-1]) * sizes[-1])


def _snap(n: int, per_octave: int, full: int, near: bool = False) -> int:
    size = bucket(n, per_octave)
    return full if n <= full and (full < size or near and full <= 1.125 * size) else size
