"""Held-out groups, gone through again and again in one order: what fits in memory is encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mllm4d_jax.data.group_encoder import EncodedGroup, GroupEncoder
from mllm4d_jax.data.reader import GroupReader
from mllm4d_jax.data.sources import Questions

# 200 clips of 32 frames at 224 x 224 pixels (4.8 MB of patches each), a small part of the memory that an accelerator's
# host has per device.
KEPT_BYTES = 1 << 30


class KeptGroups:
    """Encodes groups ahead of who iterates over them, and keeps the first ones for the next time.

    Attributes:
      groups: in their order.
    """

    def __init__(
        self, groups: Sequence[Questions], encoder: GroupEncoder, *, workers: int, ahead: int, most: int = KEPT_BYTES
    ) -> None:
        """`workers`, `ahead`: as for `GroupReader`; `most`: bytes of the examples that are kept."""
        self.groups, self._encoder, self._workers, self._ahead = groups, encoder, workers, ahead
        self._kept: list[EncodedGroup] = []
        self._room = most

    def __iter__(self) -> Iterator[EncodedGroup]:
        """Yields every group. Raises what `GroupReader.take` does."""
        kept = tuple(self._kept)
        how = {"workers": self._workers, "ahead": self._ahead, "start": len(kept)}
        with GroupReader(self.groups, self._encoder, **how) as rest:
            rest.start()
            yield from kept
            for group in rest:
                self._room -= group.nbytes
                if self._room >= 0:
                    self._kept.append(group)
                yield group
