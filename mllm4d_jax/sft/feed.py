"""The data of one optimiser step after the other, the same step on every process.

A process knows only its own clips, and arrays of a run over several processes must have one shape everywhere. So the
processes tell each other what each of them needs, and pad to what holds all of it. The same message says whether one of
them was asked to stop or cannot go on, so that none is left waiting for another.

It is sent before the step ahead of the one it is about: a message waits for the device, and sent any later it would
leave the device idle while the arrays are put together.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mllm4d_jax.data.loader import Loader
from mllm4d_jax.data.steps import Counts, LoadedBatch, PreparedStep
from mllm4d_jax.parallel import multihost
from mllm4d_jax.rows.rows import RowBatch, RowSizes
from mllm4d_jax.run.throughput import FlopCounter
from mllm4d_jax.run.watchdog import Watchdog

_GO, _BARREN, _STOP, _FAILED = range(4)


@dataclasses.dataclass(frozen=True)
class StepData:
    """The data of one optimiser step."""

    batches: tuple[RowBatch, ...]  # this process's rows of every micro-batch
    keys: tuple[str, ...]  # of this process's records
    position: int  # groups consumed by then, over all processes; the loader's whole state
    counts: Counts  # over all processes
    waited: float  # seconds this process waited for its data


class StepFeed:
    """Gives steps until asked to stop. Use inside the context of the loader's stream."""

    def __init__(
        self,
        loader: Loader,
        accumulation: int,
        flops: FlopCounter,
        stop: Any,
        watchdog: Watchdog,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
          loader: of the micro-batches.
          accumulation: micro-batches of a step.
          flops: counts what a batch costs.
          stop: true once this process was asked to stop.
          watchdog: told what is waited for.
          check: raises where this process cannot go on for a reason of its own.
        """
        self._loader, self._number, self._flops = loader, accumulation, flops
        self._stop, self._watchdog, self._check = stop, watchdog, check
        self._alone = multihost.gather([0]).shape[0] == 1
        self._agreed: _Agreed | None = None
        self._waited = 0.0

    def next(self, last: bool) -> StepData | None:
        """The next step, or None once a process was asked to stop. `last`: the run needs none after it.

        Raises:
          QuarantineError: as `Loader.next_step`, and when no process has a usable record; and what `check` raises.
          OtherProcessError: that happened on another process.
        """
        if self._alone:  # arrays are put together while the device works on the step before
            prepared = self._prepare()
            sizes = [self._loader.shape.sizes(step.needed) for step in prepared]
            agreed = _Agreed(prepared, sizes, stop=not prepared)
        else:
            agreed = self._agreed or self._agree(Counts(), last=False)[0]
        if agreed.stop:
            return None
        waited, self._waited = self._waited, 0.0
        with self._watchdog.phase("putting a batch together"):
            batches = tuple(p.finish(s) for p, s in zip(agreed.prepared, agreed.sizes, strict=True))
        counts = self._count(batches)
        if not self._alone:
            self._agreed, counts = self._agree(counts, last)
        keys = tuple(key for b in batches for key in b.keys)
        return StepData(tuple(b.batch for b in batches), keys, batches[-1].position, counts, waited)

    def _prepare(self) -> tuple[PreparedStep, ...]:
        """The micro-batches of a step. Alone, none of them once asked to stop; otherwise stopping is agreed on."""
        started, parts = time.perf_counter(), []
        self._check()
        with self._watchdog.phase("waiting for data"):
            while len(parts) < self._number:
                part = self._loader.next_step(self._stop if self._alone else False)
                if part is None:
                    return ()
                parts.append(part)
        self._waited = time.perf_counter() - started
        return tuple(parts)

    def _agree(self, counts: Counts, last: bool) -> tuple[_Agreed | None, Counts]:
        """Sizes of the next step, and the sum of the counts of the one before it."""
        prepared, problem = (), None
        if not last:
            try:
                prepared = self._prepare()
            except Exception as error:  # the others must hear of it before it is raised
                problem = error
        barren = _BARREN if self._loader.stream.barren else _GO
        status = _FAILED if problem is not None else _STOP if self._stop else barren
        needed = np.zeros((self._number, len(dataclasses.fields(RowSizes))), int)
        needed[: len(prepared)] = [dataclasses.astuple(step.needed) for step in prepared] or 0
        with self._watchdog.phase("agreeing with the other processes"):
            gathered = multihost.gather([status, *dataclasses.astuple(counts), *needed.ravel().tolist()])
        statuses, told, needs = np.split(gathered, [1, 1 + len(dataclasses.fields(Counts))], axis=1)
        multihost.refuse(statuses[:, 0] == _FAILED, problem)
        if (statuses == _BARREN).all():
            raise self._loader.stream.nothing_usable()
        total = Counts(*told.sum(axis=0).tolist())
        if last:
            return None, total
        sizes = [RowSizes(*size) for size in needs.max(axis=0).reshape(needed.shape).tolist()]
        stop = bool((statuses == _STOP).any())
        return _Agreed(prepared, [self._loader.shape.sizes(size) for size in sizes], stop), total

    def _count(self, batches: Sequence[LoadedBatch]) -> Counts:
        """Of this process alone."""
        summed = Counts(*np.sum([dataclasses.astuple(b.counts) for b in batches], axis=0).tolist())
        gflops = round(sum(self._flops(b) for b in batches) / 1e9)
        return dataclasses.replace(summed, rejected=batches[-1].counts.rejected, gflops=gflops)


@dataclasses.dataclass(frozen=True)
class _Agreed:
    """A step that all processes know the sizes of; `stop`: one of them wants it not to be taken."""

    prepared: tuple[PreparedStep, ...]
    sizes: Sequence[RowSizes]
    stop: bool
