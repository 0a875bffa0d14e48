"""Groups of questions, encoded ahead of time and in order by Grain: in a thread, or in worker processes.

Fetching and decoding have time limits of their own (`files.remote`, `media.decode_pool`), and no record is at fault for
a bucket that does not answer. For what else can go wrong in a worker, it notes in a roster what it encodes: a group
that takes too long or kills its worker twice is refused, and Grain's iterator is built anew at the first group that did
not arrive, so nothing else changes. What a reader gives depends on nothing but its groups.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import cv2
import grain
import numpy as np

from mllm4d_jax.data.group_encoder import EncodedGroup, GroupEncoder
from mllm4d_jax.data.roster import Gate, Roster
from mllm4d_jax.data.sources import Questions
from mllm4d_jax.encode.example import Example
from mllm4d_jax.qa.errors import RecordError

_POLL_S = 0.2  # between two looks at the stop signal
_START_LIMIT_S = 300.0  # importing OpenCV and JAX from a cold, shared disk
_GRACE_S = 1.0  # for a group under way when the reader is closed; then its worker is killed
_MOST_RESTARTS = 3  # without a group that arrived or could be blamed

log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """The worker processes die or do not start, and no record is to blame."""


class GroupReader:
    """Encodes groups in order, ahead of who takes them. Starts when asked for the first; close it, or use `with`.

    Worker processes need absl's flags to be parsed, or marked as such, which run.py does.
    """

    def __init__(
        self,
        groups: Sequence[Questions],
        encoder: GroupEncoder,
        *,
        workers: int,
        ahead: int,
        start: int = 0,
        known: Callable[[int, int], bool] | None = None,
    ) -> None:
        """
        Args:
          groups: to encode; asked for their number and for single ones only, also in other processes.
          encoder: of their sources; each worker process has its share of the cache of decoded clips.
          workers: processes that encode; 0 = one thread of this process.
          ahead: groups that are encoded before they are taken.
          start: place of the first one.
          known: (source, record) -> whether it need not be tried. Workers ask a copy from when they started, so who
            takes the groups has to leave out what is known by then.
        """
        self._groups, self._encoder, self._known = groups, encoder, known
        self._workers, self._ahead, self._place = workers, max(1, ahead), start
        self.limit_s = 60 + 4 * encoder.encoder.options.decode_timeout_s  # in a worker, between files
        self._refused: dict[int, tuple[str, str]] = {}
        self._deaths: collections.Counter[int] = collections.Counter()
        self._restarts = 0
        self._roster: Roster | None = None
        self._gate: Gate | None = None
        self._iterator: Any = None
        # Grain's iterators wait without a limit, so a thread waits in the caller's place.
        self._waiter: concurrent.futures.ThreadPoolExecutor | None = None
        self._next: concurrent.futures.Future[EncodedGroup] | None = None

    def start(self) -> None:
        """Begins to encode, if it did not yet."""
        if self._next is not None or self._place >= len(self._groups):
            return
        n, encoder = self._workers, self._encoder
        self._roster, self._gate = (Roster(n), None) if n else (None, Gate())
        own = encoder.with_cache(encoder.cache_bytes // n) if n else encoder
        work = _Work(own, self._known, dict(self._refused), self._place, self._roster, self._gate, n)
        data = grain.MapDataset.source(self._groups)[self._place :].map_with_index(work)
        if n:
            # Grain buffers as much again in this process. A worker has no other thread that encodes: so nothing of
            # Grain's is lost when it is killed while it does.
            options = grain.MultiprocessingOptions(n, per_worker_buffer_size=max(1, self._ahead // (2 * n)))
            read = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            read = read.mp_prefetch(options, functools.partial(_prepare_process, self._roster))
        else:
            read = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._ahead))
        self._iterator = iter(read)
        self._waiter = concurrent.futures.ThreadPoolExecutor(1, "loader")
        self._next = self._waiter.submit(self._read)

    def take(self, stop: object = False) -> EncodedGroup | None:
        """Returns the next group; None when `stop` became true before it was there.

        Raises:
          WorkerError: workers die again and again; and whatever the encoder raises that is not about a record.
        """
        while True:
            self.start()
            while not stop and not concurrent.futures.wait([self._next], timeout=_POLL_S).done:
                self._watch()
            if stop:
                return None
            try:
                group = self._next.result()
            except RuntimeError as error:
                if not self._workers:
                    raise
                self._recover(error)
                continue
            self._place, self._restarts = self._place + 1, 0
            if self._place < len(self._groups):
                self._next = self._waiter.submit(self._read)
            return group

    def __iter__(self) -> Iterator[EncodedGroup]:
        while self._place < len(self._groups):
            yield self.take()

    def _read(self) -> EncodedGroup:
        element = next(self._iterator)
        return _unpacked(*element) if self._workers else element

    def _watch(self) -> None:
        """Kills a worker that takes too long; its group is refused when the iterator is built anew."""
        if self._roster is None:
            return
        for place in self._roster.kill(longer_than_s=self.limit_s):
            message = (
                f"was not encoded within {self.limit_s:g} s after its files were read; its worker process was killed"
            )
            self._refused[place] = (message, "timeout")
        if self._roster.missing_for() > _START_LIMIT_S:
            raise WorkerError(f"a worker process did not start within {_START_LIMIT_S:g} s; set data.workers = 0")

    def _recover(self, error: RuntimeError) -> None:
        """Ends the other workers after the death of one and finds out what it died of; `start` then goes on."""
        blamed = self._roster.died()
        self.close()
        for place in blamed:
            self._deaths[place] += 1
            if self._deaths[place] == 2:
                self._refused.setdefault(place, ("its worker process died twice while encoding it", "worker_crash"))
        self._restarts += not blamed
        questions = self._groups[self._place]
        keys = ", ".join(map(self._encoder.sources[questions.source].key, questions.indices))
        if self._restarts == _MOST_RESTARTS:
            raise WorkerError(
                f"worker processes died {_MOST_RESTARTS} times before the group of {keys} was there, but not while "
                f"they encoded ({error}). Look at memory and, with exit code -7, at the size of /dev/shm; or set "
                "data.workers = 0"
            ) from error
        log.warning("a worker process died (%s); going on with new ones at the group of %s", error, keys)

    def close(self) -> None:
        """Ends thread or processes. A group under way is waited for, in a worker process for a second only."""
        if self._next is None:
            return
        if self._roster is not None:
            self._roster.close()
            killer = threading.Timer(_GRACE_S, self._roster.kill)
            killer.start()
            concurrent.futures.wait([self._next])
            with contextlib.suppress(Exception):  # raised again for a worker that could not even be made
                self._iterator.get_state()  # without it, Grain forgets to close workers of which nothing was asked yet
        self._iterator.close()
        if self._roster is not None:
            killer.cancel()
        else:
            self._gate.close()
        self._waiter.shutdown()
        self._next = self._iterator = None
        gc.collect()  # the error that ended a thread of Grain holds the thread's last array in shared memory
        if self._workers:
            time.sleep(0.1)  # arrays are freed in another thread, which the end of the interpreter would cut short

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _Work:
    """What Grain maps over the groups from place `start` on; see `GroupReader` for the rest."""

    encoder: GroupEncoder
    known: Callable[[int, int], bool] | None
    refused: dict[int, tuple[str, str]]
    start: int
    roster: Roster | None
    gate: Gate | None
    workers: int

    def __call__(self, index: int, questions: Questions) -> EncodedGroup | tuple[EncodedGroup, list[np.ndarray]]:
        place, source = self.start + index, questions.source
        if place in self.refused:
            return _packed(self.encoder.refuse(questions, *self.refused[place]))
        good = tuple(i for i in questions.indices if self.known is None or not self.known(source, i))
        asked = dataclasses.replace(questions, indices=good)
        if self.roster is None:
            with self.gate.at_work():
                return dataclasses.replace(self.encoder(asked), questions=questions)
        worker = index % self.workers  # Grain gives worker w of n the groups w, w + n, ...
        self.encoder.encoder.unwatched = functools.partial(self.roster.unwatched, worker)  # this process has its own
        with self.roster.at_work(worker, place):
            group = self.encoder(asked)
        return _packed(dataclasses.replace(group, questions=questions))


def _prepare_process(roster: Roster, worker: int, workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cv2.setNumThreads(1)
    roster.enter(worker)


def _packed(group: EncodedGroup) -> tuple[EncodedGroup, list[np.ndarray]]:
    """Takes the patches out of a group, so that Grain passes them on in shared memory; leaves their numbers there.

    The examples of a group hold one array, which is passed on once.
    """
    arrays = list({id(e.patches): e.patches for e in group.examples}.values())
    number = {id(array): np.array(n) for n, array in enumerate(arrays)}
    return _with_patches(group, lambda e: number[id(e.patches)]), [np.ascontiguousarray(a) for a in arrays]


def _unpacked(group: EncodedGroup, arrays: Sequence[np.ndarray]) -> EncodedGroup:
    own = [np.array(a) for a in arrays]  # copied: examples may live longer than shared memory should
    return _with_patches(group, lambda e: own[int(e.patches)])


def _with_patches(group: EncodedGroup, patches: Callable[[Example], np.ndarray]) -> EncodedGroup:
    results = {
        i: r if isinstance(r, RecordError) else dataclasses.replace(r, patches=patches(r))
        for i, r in group.results.items()
    }
    return dataclasses.replace(group, results=results)
