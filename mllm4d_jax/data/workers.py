"""Worker processes that encode groups, each watched by a thread: none that dies or hangs can hold up the run.

Processes are spawned, never forked: safe after JAX has started threads. Each holds its own copy of the group encoder,
with decoder processes of its own, and ends when this process does.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

from mllm4d_jax.data.group_encoder import Encoded, GroupEncoder
from mllm4d_jax.data.sources import Questions

_START_LIMIT_S = 300.0  # importing OpenCV and the tokenizer from a cold, shared disk


class WorkerError(RuntimeError):
    """A fault of the program in a worker (never a bad record); carries the worker's traceback."""


class _Gone(Exception):
    """The worker process died or was killed."""


class _Worker:
    """One process."""

    def __init__(self, encoder: GroupEncoder) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, encoder), daemon=True, name="loader-worker")
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self._receive(_START_LIMIT_S)

    def ask(self, questions: Questions, limit_s: float) -> Encoded:
        """Raises _Gone (also after killing a process that hangs: TimeoutError is its cause), WorkerError."""
        try:
            self._pipe.send(questions)
        except OSError as error:
            raise _Gone from error
        return self._receive(limit_s)

    def _receive(self, limit_s: float) -> Encoded:
        try:
            if not self._pipe.poll(limit_s):
                self.kill()
                raise _Gone from TimeoutError(limit_s)
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.kill()
            raise _Gone from error
        if kind == "fault":
            raise WorkerError(f"a loader worker failed:\n{value}")
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


def _serve(pipe: Connection, encoder: GroupEncoder) -> None:
    """The worker's life: answers requests until the pipe closes."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cv2.setNumThreads(1)
    pipe.send(("ready", None))
    with encoder.encoder:
        while True:
            try:
                questions = pipe.recv()
            except (EOFError, OSError):
                return
            try:
                reply = ("done", encoder(questions))
            except Exception:  # handed to the main process, which raises it
                reply = ("fault", traceback.format_exc())
            pipe.send(reply)


class WorkerPool:
    """Encodes groups in `count` processes. Close it, or use it as a context manager."""

    def __init__(self, encoder: GroupEncoder, count: int, limit_s: float) -> None:
        """
        Args:
          encoder: what the processes run; each keeps `cache_bytes / count` of decoded clips.
          count: processes, started when they are first needed.
          limit_s: seconds that one group may take before its process is killed and the group is refused.
        """
        self.limit_s, self._encoder = limit_s, encoder
        self._copy = encoder.with_cache(encoder.cache_bytes // count)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="loader-watch")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: set[_Worker] = set()
        self._lock, self._closed = threading.Lock(), False

    def submit(self, questions: Questions) -> Future[Encoded]:
        """Encodes a group in the background.

        A group whose process died is tried once more in a new one, then refused with reason "worker_crash"; one that
        takes too long is refused with "timeout".
        """
        return self._threads.submit(self._run, questions)

    def _run(self, questions: Questions) -> Encoded:
        for _ in range(2):
            worker = None
            try:
                worker = self._take()
                result = worker.ask(questions, self.limit_s)
            except _Gone as gone:
                if worker is not None:
                    self._forget(worker)
                if isinstance(gone.__cause__, TimeoutError):
                    what = f"was not encoded within {self.limit_s:g} s; its worker process was killed"
                    return self._encoder.refuse(questions, what, "timeout")
            else:
                self._idle.put(worker)
                return result
        return self._encoder.refuse(questions, "its worker process died twice while encoding it", "worker_crash")

    def _take(self) -> _Worker:
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                break
            if worker.process.is_alive():
                return worker
            self._forget(worker)
        worker = _Worker(self._copy)
        with self._lock:
            self._all.add(worker)
            closed = self._closed
        if closed:
            worker.kill()
            raise _Gone
        return worker

    def _forget(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            self._all.discard(worker)

    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        with self._lock:
            return [w.process.pid for w in self._all if w.process.is_alive()]

    def close(self) -> None:
        """Ends the processes; groups that are being encoded are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed, workers = True, list(self._all)
        for worker in workers:
            worker.process.kill()  # its thread sees the pipe end
        self._threads.shutdown(wait=True)
        for worker in workers:
            worker.kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
