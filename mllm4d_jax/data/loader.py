"""Steps for training: the groups of a stream, laid out as rows and padded to few shapes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, Self

from mllm4d_jax.data.steps import LoadedBatch, PreparedStep
from mllm4d_jax.data.stream import GroupStream, LoaderError, StreamOptions
from mllm4d_jax.rows.rows import pack_groups, share_prefix
from mllm4d_jax.rows.shape import RowShape


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """What decides the content and the shapes of a step.

    Attributes:
      batch_size: places for questions in a step, over all hosts.
      questions_per_video: most questions about one clip that share its prefix, N.
      rows: rows of a step, over all hosts; 0 = one per group.
      workers: processes that encode; 0 = a thread of this process.
    """

    batch_size: int
    questions_per_video: int = 1
    rows: int = 0
    workers: int = 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], batch_size: int) -> Self:
        """Options from a config group such as `config.data`; its other keys are not the loader's."""
        known = {f.name for f in dataclasses.fields(cls)} & set(values.keys())
        return cls(batch_size, **{name: values[name] for name in known})

    @property
    def groups(self) -> int:
        """Groups of a step, over all hosts."""
        return self.batch_size // self.questions_per_video

    @property
    def clips_per_row(self) -> int:
        """Clips of a full row."""
        return -(-self.groups // (self.rows or self.groups))

    def local(self, hosts: int) -> tuple[int, int]:
        """(groups, rows) of a step on each host.

        Raises:
          LoaderError: questions, groups or rows cannot be divided.
        """
        if self.questions_per_video < 1 or self.batch_size % self.questions_per_video:
            raise LoaderError(
                f"train.batch_size = {self.batch_size} questions cannot be taken data.questions_per_video = "
                f"{self.questions_per_video} at a time"
            )
        rows = self.rows or self.groups
        if self.groups % hosts or rows % hosts:
            raise LoaderError(f"{self.groups} groups in {rows} rows cannot be split evenly over {hosts} hosts")
        return self.groups // hosts, rows // hosts

    def stream(self, *, seed: int, ahead_steps: int = 1, host: int = 0, hosts: int = 1) -> StreamOptions:
        """Return which groups make a host's steps, so many steps of them read ahead. Raises as `local`."""
        groups, _ = self.local(hosts)
        of = {"seed": seed, "workers": self.workers, "ahead": groups * ahead_steps, "host": host, "hosts": hosts}
        return StreamOptions(per_group=self.questions_per_video, step_groups=self.groups, **of)


class Loader:
    """Gives the steps of a run from the position of a stream on, without end.

    Attributes:
      stream: the groups; its position is the whole state of the loader. Has to be closed.
      options, shape: as given.
    """

    def __init__(self, stream: GroupStream, options: LoaderOptions, shape: RowShape) -> None:
        """
        Args:
          stream: made with `options.stream`.
          options: what a step holds.
          shape: how rows are laid out and padded.

        Raises:
          LoaderError: settings that cannot be divided.
        """
        _, self._rows = options.local(stream.options.hosts)
        self.stream, self.options, self.shape = stream, options, shape

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

    def next_batch(self, stop: object = False) -> LoadedBatch | None:
        """Return the next step padded at once, for a run on one host. As `next_step` otherwise."""
        step = self.next_step(stop)
        return None if step is None else step.finish(self.shape.sizes(step.needed))
