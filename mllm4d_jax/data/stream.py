"""Groups of questions in a fixed global order, each with what came of encoding it; nothing here knows about rows.

The order (`data.order`) is a pure function of (seed, position). The position, a count of groups since the start of the
run over all hosts, is the whole state of a stream; a checkpoint holds it and nothing of Grain's or of the workers'.
"""

from __future__ import annotations

import dataclasses
from typing import Self

from mllm4d_jax.data.group_encoder import EncodedGroup, GroupEncoder
from mllm4d_jax.data.order import HostOrder, Order
from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.data.reader import GroupReader
from mllm4d_jax.data.sources import Mixture


class LoaderError(ValueError):
    """The settings of what loads the data cannot work."""


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Which groups a host reads, and how.

    Attributes:
      per_group: most questions about one clip that are taken together.
      step_groups: groups of a step, over all hosts.
      seed: of the order.
      workers: processes that encode; 0 = a thread of this process.
      ahead: groups of this host that are encoded ahead of the step under way.
      host, hosts: which of the processes that share the run this is.
    """

    per_group: int
    step_groups: int
    seed: int
    workers: int = 0
    ahead: int = 1
    host: int = 0
    hosts: int = 1


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
        options: StreamOptions,
        position: int = 0,
    ) -> None:
        """
        Args:
          mixture: where records come from.
          encoder: of its sources.
          quarantine: where unusable records go.
          options: which groups are read, and how.
          position: groups consumed before this point of the run, a whole number of steps.

        Raises:
          LoaderError: groups that cannot be divided, or a position inside a step.
        """
        step, hosts = options.step_groups, options.hosts
        if step < 1 or step % hosts:
            raise LoaderError(f"{step} groups a step cannot be split evenly over {hosts} hosts")
        if position % step:
            raise LoaderError(f"position {position} is inside a step of {step} groups")
        self.mixture, self.encoder, self.quarantine, self.options = mixture, encoder, quarantine, options
        self.order = Order(
            [s.clips for s in mixture.sources], mixture.rates, per_group=options.per_group, seed=options.seed
        )
        self.position = position
        self._barren = 0  # records in a row of which none was usable
        mine = HostOrder(self.order, step, options.host, hosts)
        self._reader = GroupReader(
            mine,
            encoder,
            workers=options.workers,
            ahead=options.ahead,
            start=position // step * mine.per_step,
            known=quarantine.knows,
        )

    def next_groups(self, stop: object = False) -> list[EncodedGroup] | None:
        """This host's groups of the next step; None when `stop` became true before it was complete (the stream is then
        of no further use).

        A record or clip that cannot be used leaves its place empty: the group is there with fewer results, or none.

        Raises:
          QuarantineError: too many records are unusable.
        """
        hosts, groups = self.options.hosts, []
        for n in range(self.options.step_groups // hosts):
            group = self._reader.take(stop)
            if group is None:
                return None
            groups.append(self._accounted(group, self.order.questions_until(self.position + (n + 1) * hosts) / hosts))
        self.position += self.options.step_groups
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
        # More than a whole epoch, wherever in one it began.
        if self._barren * self.options.hosts > 2 * len(self.mixture):
            raise QuarantineError(f"not one usable record in {self.mixture.name}; see {self.quarantine.path}")
        return group

    def close(self) -> None:
        """Ends what encodes ahead."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
