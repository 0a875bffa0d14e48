"""Steps for training: the groups of a stream, laid out as rows and padded to few shapes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.order import Order
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.data.steps import LoadedBatch, PreparedStep
from mllm4d_jax.data.stream import GroupStream, LoaderError
from mllm4d_jax.rows.rows import pack_groups, share_prefix
from mllm4d_jax.rows.shape import RowShape

__all__ = ["Loader", "LoaderError", "LoaderOptions"]


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """What decides the content and the shapes of a step.

    Attributes:
      batch_size: places for questions in a step, over all hosts.
      questions_per_video: most questions about one clip that share its prefix, N.
      rows: rows of a step, over all hosts; 0 = one per group.
      workers: processes that encode; 0 = encode in this process.
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


class Loader:
    """Gives the steps of a run from a position on, without end. Use as a context manager, or close it.

    Attributes:
      stream: the groups; its position is the whole state of the loader.
      options, shape: as given.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: GroupEncoder,
        options: LoaderOptions,
        shape: RowShape,
        quarantine: Quarantine,
        *,
        seed: int,
        position: int = 0,
        host: int = 0,
        hosts: int = 1,
    ) -> None:
        """
        Args:
          mixture: where records come from.
          encoder: of its sources.
          options: what a step holds.
          shape: how rows are laid out and padded.
          quarantine: where unusable records go.
          seed: of the order.
          position: groups consumed before this point of the run, a whole number of steps.
          host, hosts: which of the processes that share the run this is.

        Raises:
          LoaderError: settings that cannot be divided, or a position inside a step.
        """
        _, self._rows = options.local(hosts)
        self.options, self.shape = options, shape
        self.stream = GroupStream(
            mixture,
            encoder,
            quarantine,
            per_group=options.questions_per_video,
            step_groups=options.groups,
            workers=options.workers,
            seed=seed,
            position=position,
            host=host,
            hosts=hosts,
        )

    @property
    def position(self) -> int:
        """Groups consumed over all hosts."""
        return self.stream.position

    @property
    def order(self) -> Order:
        """Which questions each group holds."""
        return self.stream.order

    @property
    def mixture(self) -> Mixture:
        """Where records come from."""
        return self.stream.mixture

    @property
    def encoder(self) -> GroupEncoder:
        """Of the mixture's sources."""
        return self.stream.encoder

    def next_step(self, stop: threading.Event | None = None) -> PreparedStep | None:
        """This host's rows of the next step; None when `stop` was set before it was complete (the loader is then of no
        further use).

        A record or clip that cannot be used leaves its place empty. A step may have no usable question at all.

        Raises:
          QuarantineError: too many records are unusable.
        """
        started = time.perf_counter()
        items = self.stream.next_groups(stop)
        if items is None:
            return None
        groups = [
            g for item in items if item.examples for g in share_prefix(item.examples, self.shape.visual_token_ids)
        ]
        rows = tuple(tuple(row) for row in pack_groups(groups, self._rows))
        return PreparedStep(
            rows=rows,
            needed=self.shape.needed(rows),
            shape=self.shape,
            position=self.position,
            rejected=self.stream.quarantine.rejected,
            load_s=time.perf_counter() - started,
        )

    def next_batch(self, stop: threading.Event | None = None) -> LoadedBatch | None:
        """The next step padded at once, for a run on one host. As `next_step` otherwise."""
        step = self.next_step(stop)
        return None if step is None else step.finish(self.shape.sizes(step.needed))

    def close(self) -> None:
        """Ends the worker processes."""
        self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
