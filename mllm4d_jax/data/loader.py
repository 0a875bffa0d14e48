"""Steps for training: groups of questions in a fixed global order, encoded, checked and laid out as rows.

The order (`data.order`) is a pure function of (seed, position). The position, a count of groups since the start of the
run over all hosts, is the whole state of the loader; a checkpoint holds it and nothing of Grain's or of the workers'.
Host h of H takes the groups h, h + H, ... of each step.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Self

from mllm4d_jax.data.buckets import RowBuckets
from mllm4d_jax.data.group_encoder import Encoded, GroupEncoder
from mllm4d_jax.data.order import Order
from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.data.sources import Mixture, Questions
from mllm4d_jax.data.steps import LoadedBatch, ModelFacts, PreparedStep
from mllm4d_jax.data.workers import WorkerPool
from mllm4d_jax.processing.errors import RecordError
from mllm4d_jax.processing.rows import Group, needed_sizes, pack_groups, share_prefix

_BRANCH_BUCKETS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)


class LoaderError(ValueError):
    """The loader's settings cannot work."""


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """What decides the content and the shapes of a step.

    Attributes:
      batch_size: places for questions in a step, over all hosts.
      questions_per_video: most questions about one clip that share its prefix, N.
      rows: rows of a step, over all hosts; 0 = one per group.
      prefix_buckets, branch_buckets: allowed lengths of a row's prefix region and of its branch slots.
      workers: processes that encode; 0 = encode in this process.
    """

    batch_size: int
    questions_per_video: int = 1
    rows: int = 0
    prefix_buckets: tuple[int, ...] = ()
    branch_buckets: tuple[int, ...] = _BRANCH_BUCKETS
    workers: int = 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], batch_size: int) -> Self:
        """Options from a config group such as `config.data`; its other keys are not the loader's."""
        known = {f.name for f in dataclasses.fields(cls)} & set(values.keys())
        chosen = {name: tuple(values[name]) if name.endswith("buckets") else values[name] for name in known}
        return cls(batch_size, **chosen)

    @property
    def groups(self) -> int:
        """Groups of a step, over all hosts."""
        return self.batch_size // self.questions_per_video

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

    def buckets(self, hosts: int, *, merge_area: int, frames: int, frame_patches: int) -> RowBuckets:
        """The shapes of a host's rows.

        Args:
          merge_area: patches per merged token.
          frames: most vision frames (temporal patches) of a clip, 0 when there is no limit.
          frame_patches: most patches of a frame, 0 likewise.
        """
        groups, rows = self.local(hosts)
        return RowBuckets(
            prefix=self.prefix_buckets,
            length=self.branch_buckets,
            merge_area=merge_area,
            full_slots=-(-groups // rows) * self.questions_per_video,
            full_frames=-(-groups // rows) * frames,
            full_frame_patches=frame_patches,
        )


class Loader:
    """Gives the steps of a run from a position on, without end. Use as a context manager, or close it."""

    def __init__(
        self,
        mixture: Mixture,
        encoder: GroupEncoder,
        options: LoaderOptions,
        buckets: RowBuckets,
        model: ModelFacts,
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
          buckets: what rows are padded to.
          model: facts for the layout.
          quarantine: where unusable records go.
          seed: of the order.
          position: groups consumed before this point of the run, a whole number of steps.
          host, hosts: which of the processes that share the run this is.

        Raises:
          LoaderError: settings that cannot be divided, or a position inside a step.
        """
        self._groups, self._rows = options.local(hosts)
        if position % options.groups:
            raise LoaderError(f"position {position} is inside a step of {options.groups} groups")
        self.mixture, self.encoder, self.options, self.buckets = mixture, encoder, options, buckets
        self.quarantine, self.position = quarantine, position
        self._model, self._host, self._hosts = model, host, hosts
        clips = [source.clips for source in mixture.sources]
        self.order = Order(clips, mixture.rates, per_group=options.questions_per_video, seed=seed)
        self._pending: deque[tuple[Questions, Questions, concurrent.futures.Future[Encoded]]] = deque()
        self._asked = self._places(position)
        self._pool: WorkerPool | None = None
        self._barren = 0  # records in a row of which none was usable

    def next_step(self, stop: threading.Event | None = None) -> PreparedStep | None:
        """This host's rows of the next step; None when `stop` was set before it was complete (the loader is then of no
        further use).

        A record or clip that cannot be used leaves its place empty. A step may have no usable question at all.

        Raises:
          QuarantineError: too many records are unusable.
        """
        started = time.perf_counter()
        groups: list[Group] = []
        for n in range(self._groups):
            taken = self._take(stop)
            if taken is None:
                return None
            questions, asked, encoded = taken
            examples = [e for e in encoded if not isinstance(e, RecordError)]
            seen = self.order.questions_until(self.position + (n + 1) * self._hosts) / self._hosts
            self._account(questions, asked, encoded, seen)
            groups += share_prefix(examples, self._model.visual_token_ids) if examples else ()
        self.position += self.options.groups
        rows = tuple(tuple(row) for row in pack_groups(groups, self._rows))
        return PreparedStep(
            rows=rows,
            needed=needed_sizes(rows, self._model.geometry),
            model=self._model,
            position=self.position,
            rejected=self.quarantine.rejected,
            load_s=time.perf_counter() - started,
        )

    def next_batch(self, stop: threading.Event | None = None) -> LoadedBatch | None:
        """The next step padded at once, for a run on one host. As `next_step` otherwise."""
        step = self.next_step(stop)
        return None if step is None else step.finish(self.buckets.sizes(step.needed))

    def _places(self, position: int) -> Iterator[Questions]:
        """This host's groups from a position on."""
        while True:
            for n in range(self._groups):
                yield self.order[position + self._host + n * self._hosts]
            position += self.options.groups

    def _take(self, stop: threading.Event | None) -> tuple[Questions, Questions, Encoded] | None:
        """The next group, the part of it that was encoded, and what came of that."""
        ahead = self._groups + 2 * self.options.workers if self.options.workers else 1
        while len(self._pending) < ahead:
            if stop is not None and stop.is_set():
                return None
            questions = next(self._asked)
            good = tuple(i for i in questions.indices if not self.quarantine.knows(questions.source, i))
            asked = dataclasses.replace(questions, indices=good)
            self._pending.append((questions, asked, self._submit(asked)))
        questions, asked, future = self._pending.popleft()
        while True:
            if stop is not None and stop.is_set():
                return None
            try:
                return questions, asked, future.result(timeout=0.2)
            except concurrent.futures.TimeoutError:
                continue

    def _submit(self, asked: Questions) -> concurrent.futures.Future[Encoded]:
        if asked.indices and self.options.workers:
            if self._pool is None:
                limit = 60 + 4 * self.encoder.encoder.options.decode_timeout_s
                self._pool = WorkerPool(self.encoder, self.options.workers, limit)
            return self._pool.submit(asked)
        done: concurrent.futures.Future[Encoded] = concurrent.futures.Future()
        done.set_result(self.encoder(asked) if asked.indices else [])
        return done

    def _account(self, questions: Questions, asked: Questions, encoded: Encoded, seen: float) -> None:
        """Writes down and counts what of a group could not be used."""
        for i, result in zip(asked.indices, encoded, strict=True):
            if isinstance(result, RecordError):
                self.quarantine.add(questions.source, i, result)
        usable = sum(not isinstance(result, RecordError) for result in encoded)
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
