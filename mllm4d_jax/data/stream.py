"""Groups of questions in a fixed global order, each with what came of encoding it; nothing here knows about rows.

The order (`data.order`) is a pure function of (seed, position). The position, a count of groups since the start of the
run over all hosts, is the whole state of a stream; a checkpoint holds it and nothing of Grain's or of the workers'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from mllm4d_jax.data.group_encoder import EncodedGroup, GroupEncoder
from mllm4d_jax.data.order import HostOrder, Order
from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.data.reader import GroupReader
from mllm4d_jax.data.sources import Mixture


class LoaderError(ValueError):
    """The settings of what loads the data cannot work."""


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """What a step holds, and how it is read.

    Attributes:
      batch_size: places for questions in a step, over all hosts.
      questions_per_video: most questions about one clip that share its prefix, N.
      rows: rows of a step, over all hosts; 0 = one per group.
      workers: processes that encode; 0 = a thread of this process.
      ahead: steps that are encoded ahead of the one under way.
      seed: of the order.
      host, hosts: which of the processes that share the run this is.
    """

    batch_size: int
    questions_per_video: int = 1
    rows: int = 0
    workers: int = 0
    ahead: int = 1
    seed: int = 0
    host: int = 0
    hosts: int = 1

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


class GroupStream:
    """This host's groups, step by step, from a position on, without end. Use as a context manager, or close it.

    Attributes:
      mixture, encoder, quarantine, options: as given.
      order: which questions each group holds.
      position: groups consumed over all hosts; goes on by a whole step at a time.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: GroupEncoder,
        quarantine: Quarantine,
        options: LoaderOptions,
        position: int = 0,
    ) -> None:
        """
        Args:
          mixture: where records come from.
          encoder: of its sources.
          quarantine: where unusable records go.
          options: what a step holds, and how it is read.
          position: groups consumed before this point of the run.

        Raises:
          LoaderError: groups that cannot be divided.
        """
        groups, _ = options.local(options.hosts)
        self.mixture, self.encoder, self.quarantine, self.options = mixture, encoder, quarantine, options
        clips, per_group = [source.clips for source in mixture.sources], options.questions_per_video
        self.order = Order(clips, mixture.rates, per_group=per_group, seed=options.seed)
        self.position = position
        self._barren = 0  # records in a row of which none was usable
        self._reader = GroupReader(
            HostOrder(self.order, options.host, options.hosts),
            encoder,
            workers=options.workers,
            ahead=options.ahead * groups,
            start=-((options.host - position) // options.hosts),
            known=quarantine.knows,
        )

    def next_groups(self, stop: object = False, count: int | None = None) -> list[EncodedGroup] | None:
        """This host's groups of the next step; None when `stop` became true before it was complete (the stream is then
        of no further use).

        A record or clip that cannot be used leaves its place empty: the group is there with fewer results, or none.

        Args:
          count: groups over all hosts that are taken in place of a step's.

        Raises:
          QuarantineError: too many records are unusable; on a single host, also if there is not a usable one. Several
            hosts have to ask each other whether all of them are `barren`.
        """
        hosts, host, groups = self.options.hosts, self.options.host, []
        end = self.position + (self.options.groups if count is None else count)
        for place in range(self.position + (host - self.position) % hosts, end, hosts):
            group = self._reader.take(stop)
            if group is None:
                return None
            groups.append(self._accounted(group, self.order.questions_until(place - host + hosts) / hosts))
        self.position = end
        return groups

    def _accounted(self, group: EncodedGroup, seen: float) -> EncodedGroup:
        """Writes down and counts what of a group could not be used; drops what was known before."""
        source, indices = group.questions.source, group.questions.indices
        tried = {i: result for i, result in group.results.items() if not self.quarantine.knows(source, i)}
        group = dataclasses.replace(group, results=tried)
        for i, error in group.errors.items():
            self.quarantine.add(source, i, error)
        usable = len(group.examples)
        for _ in range(len(indices) - usable):
            self.quarantine.count(seen)
        self._barren = 0 if usable else self._barren + len(indices)
        if self.barren and self.options.hosts == 1:
            raise self.nothing_usable()
        return group

    @property
    def barren(self) -> bool:
        """None of this host's records was usable for so long that it is more than a whole epoch, wherever it began."""
        return self._barren * self.options.hosts > 2 * len(self.mixture)

    def nothing_usable(self) -> QuarantineError:
        """Return the error for a run of which not one record was usable."""
        return self.quarantine.nothing_usable(self.mixture.name)

    def close(self) -> None:
        """Ends what encodes ahead."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
