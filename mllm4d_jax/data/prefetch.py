"""One batch ahead: the next one is made while the device works on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs `produce` one call ahead in a thread. Use as a context manager; the thread ends with it."""

    def __init__(self, produce: Callable[[threading.Event], T | None]) -> None:
        """`produce`: gives the next item, None once the event is set (`Loader.next_batch`, `Loader.next_step`)."""
        self._produce = produce
        self._queue: queue.Queue = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def __enter__(self) -> Prefetcher[T]:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()  # bounded: a clip in decoding ends at its time limit

    def poll(self, timeout: float) -> T | None:
        """The next item, or None when it is not there after `timeout` seconds; re-raises what the thread raised."""
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            while (item := self._produce(self._stop)) is not None and self._put(item):
                pass
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: object) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
