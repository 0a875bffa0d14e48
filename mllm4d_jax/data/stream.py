"""Groups of questions in a fixed global order, each with what came of encoding it; nothing here knows about rows.

The order (`data.order`) is a pure function of (seed, position). The position, a count of groups since the start of the
run over all hosts, is the whole state of a stream; a checkpoint holds it and nothing of Grain's or of the workers'.
Host h of H takes the groups h, h + H, ... of each step.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections import deque
from collections.abc import Iterator
from typing import Self

from mllm4d_jax.data.group_encoder import Encoded, GroupEncoder
from mllm4d_jax.data.order import Order
from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.data.sources import Mixture, Questions
from mllm4d_jax.data.workers import WorkerPool
from mllm4d_jax.encode.example import Example
from mllm4d_jax.qa.errors import RecordError


class LoaderError(ValueError):
    """The settings of what loads the data cannot work."""


@dataclasses.dataclass(frozen=True)
class StreamItem:
    """A group of questions.

    Attributes:
      questions: as the order has it.
      results: (record index, Example or what is wrong with it), in the order of `questions`; without the records that
        were known to be unusable before and so not tried.
      position: of the group in the global order.
    """

    questions: Questions
    results: tuple[tuple[int, Example | RecordError], ...]
    position: int

    @property
    def examples(self) -> tuple[Example, ...]:
        """What can be used of it."""
        return tuple(result for _, result in self.results if not isinstance(result, RecordError))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A group under way: `asked` is the part of `questions` that is encoded."""

    position: int
    questions: Questions
    asked: Questions
    future: concurrent.futures.Future[Encoded]


class GroupStream:
    """This host's groups, step by step, from a position on, without end. Use as a context manager, or close it.

    Attributes:
      mixture, encoder, quarantine: as given.
      order: which questions each group holds.
      position: groups consumed over all hosts; goes on by a whole step at a time.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: GroupEncoder,
        quarantine: Quarantine,
        *,
        per_group: int,
        step_groups: int,
        workers: int,
        seed: int,
        position: int = 0,
        host: int = 0,
        hosts: int = 1,
    ) -> None:
        """
        Args:
          mixture: where records come from.
          encoder: of its sources.
          quarantine: where unusable records go.
          per_group: most questions about one clip that are taken together.
          step_groups: groups of a step, over all hosts.
          workers: processes that encode; 0 = encode in this process.
          seed: of the order.
          position: groups consumed before this point of the run, a whole number of steps.
          host, hosts: which of the processes that share the run this is.

        Raises:
          LoaderError: groups that cannot be divided, or a position inside a step.
        """
        if step_groups < 1 or step_groups % hosts:
            raise LoaderError(f"{step_groups} groups a step cannot be split evenly over {hosts} hosts")
        if position % step_groups:
            raise LoaderError(f"position {position} is inside a step of {step_groups} groups")
        self.mixture, self.encoder, self.quarantine, self.position = mixture, encoder, quarantine, position
        self.order = Order([s.clips for s in mixture.sources], mixture.rates, per_group=per_group, seed=seed)
        self._step_groups, self._groups, self._workers = step_groups, step_groups // hosts, workers
        self._host, self._hosts = host, hosts
        self._pending: deque[_Asked] = deque()
        self._places = self._from(position)
        self._pool: WorkerPool | None = None
        self._barren = 0  # records in a row of which none was usable

    def next_groups(self, stop: threading.Event | None = None) -> list[StreamItem] | None:
        """This host's groups of the next step; None when `stop` was set before it was complete (the stream is then of
        no further use).

        A record or clip that cannot be used leaves its place empty: the item is there with fewer results, or none.

        Raises:
          QuarantineError: too many records are unusable.
        """
        items = []
        for n in range(self._groups):
            item = self._take(stop)
            if item is None:
                return None
            seen = self.order.questions_until(self.position + (n + 1) * self._hosts) / self._hosts
            self._account(item, seen)
            items.append(item)
        self.position += self._step_groups
        return items

    def _from(self, position: int) -> Iterator[int]:
        """Positions of this host's groups, from the step that begins at `position` on."""
        while True:
            yield from range(position + self._host, position + self._step_groups, self._hosts)
            position += self._step_groups

    def _take(self, stop: threading.Event | None) -> StreamItem | None:
        """The next group; keeps the workers busy with those after it."""
        ahead = self._groups + 2 * self._workers if self._workers else 1
        while len(self._pending) < ahead:
            if stop is not None and stop.is_set():
                return None
            self._pending.append(self._ask(next(self._places)))
        taken = self._pending.popleft()
        while stop is None or not stop.is_set():
            try:
                results = taken.future.result(timeout=0.2)
            except concurrent.futures.TimeoutError:
                continue
            return StreamItem(taken.questions, tuple(zip(taken.asked.indices, results, strict=True)), taken.position)
        return None

    def _ask(self, position: int) -> _Asked:
        questions = self.order[position]
        good = tuple(i for i in questions.indices if not self.quarantine.knows(questions.source, i))
        asked = dataclasses.replace(questions, indices=good)
        return _Asked(position, questions, asked, self._submit(asked))

    def _submit(self, asked: Questions) -> concurrent.futures.Future[Encoded]:
        if asked.indices and self._workers:
            if self._pool is None:
                limit = 60 + 4 * self.encoder.encoder.options.decode_timeout_s
                self._pool = WorkerPool(self.encoder, self._workers, limit)
            return self._pool.submit(asked)
        done: concurrent.futures.Future[Encoded] = concurrent.futures.Future()
        done.set_result(self.encoder(asked) if asked.indices else [])
        return done

    def _account(self, item: StreamItem, seen: float) -> None:
        """Writes down and counts what of a group could not be used."""
        questions, usable = item.questions, len(item.examples)
        for i, result in item.results:
            if isinstance(result, RecordError):
                self.quarantine.add(questions.source, i, result)
        for _ in range(len(questions.indices) - usable):
            self.quarantine.count(seen)
        self._barren = 0 if usable else self._barren + len(questions.indices)
        if self._barren * self._hosts > 2 * len(self.mixture):  # more than a whole epoch, wherever in one it began
            raise QuarantineError(f"not one usable record in {self.mixture.name}; see {self.quarantine.path}")

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
