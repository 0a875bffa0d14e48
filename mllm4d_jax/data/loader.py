"""Steps for training: the groups of a stream, laid out as rows and padded to few shapes."""

from __future__ import annotations

import time

from mllm4d_jax.data.steps import PreparedStep
from mllm4d_jax.data.stream import GroupStream, LoaderError
from mllm4d_jax.rows.rows import pack_groups, share_prefix
from mllm4d_jax.rows.shape import RowShape


class Loader:
    """Gives the steps of a run from the position of a stream on, without end.

    Attributes:
      stream: the groups; its position is the whole state of the loader. Has to be closed.
      shape: as given.
    """

    def __init__(self, stream: GroupStream, shape: RowShape) -> None:
        """`shape`: how rows are laid out and padded. Raises LoaderError for a stream that begins inside a step."""
        _, self._rows = stream.options.local(stream.options.hosts)
        if stream.position % stream.options.groups:
            raise LoaderError(f"position {stream.position} is inside a step of {stream.options.groups} groups")
        self.stream, self.shape = stream, shape

    def next_step(self, stop: object = False) -> PreparedStep | None:
        """Return this host's rows of the next step; None when `stop` became true before it was complete (the loader is
        then of no further use).

        A record or clip that cannot be used leaves its place empty. A step may have no usable question at all.

        Raises:
          QuarantineError: too many records are unusable.
        """
        started = time.perf_counter()
        encoded = self.stream.next_groups(stop)
        if encoded is None:
            return None
        groups = [g for e in encoded for g in share_prefix(e.examples, self.shape.visual_token_ids)]
        rows = tuple(tuple(row) for row in pack_groups(groups, self._rows))
        return PreparedStep(
            rows=rows,
            needed=self.shape.needed(rows),
            shape=self.shape,
            position=self.stream.position,
            rejected=self.stream.quarantine.rejected,
            load_s=time.perf_counter() - started,
        )
