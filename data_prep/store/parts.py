"""The unit of resumable work: one clip, one result file.

Whatever is done to a clip ends in `parts/<clip_id>.json`, written whole or not at all. A run that is killed at any
moment and started again does the clips that have no file yet, and those whose own files were at fault; which process
did a clip leaves no trace in its file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import cv2
from tqdm import tqdm

from data_prep.store.untrusted import read_bytes
from mllm4d_jax.files.atomic import remove_partials, write_atomic
from mllm4d_jax.files.lock import LockError, WriterLock
from mllm4d_jax.files.quoting import cut, shown
from mllm4d_jax.files.storage import storing
from mllm4d_jax.qa.errors import RecordError

PART_FORMAT = 2
_MAX_PART_BYTES = 2**28
_AGAIN = b'"again":true'  # as `canonical_json` writes it
_LONGEST_NAME = 160  # leaves room for suffixes below the 255 bytes of common file systems


class StoreError(ValueError):
    """What is to be written, or a file of an earlier run, cannot be used; the message names clip, row or file."""


class ClipRejected(ValueError):
    """Raised by a work function when a clip gives nothing; the run records it and goes on.

    Attributes:
      reason: short machine word, e.g. "no_motion".
      detail: for people.
      source_id: the source video, '' if unknown.
      again: whether the clip's files may be mended, so that the next run tries it again.
    """

    def __init__(self, reason: str, detail: str, source_id: str = "", again: bool = False) -> None:
        super().__init__(reason, detail, source_id, again)  # all in `args`: survives the way back from a worker process
        self.reason, self.detail, self.source_id, self.again = reason, detail, source_id, again

    def entry(self) -> dict[str, Any]:
        """Return what `ClipResult.rejected` says of it."""
        return _entry(self.reason, self.detail, self.again)


@dataclasses.dataclass(frozen=True)
class ClipResult:
    """What one clip gave.

    Attributes:
      clip_id: the clip.
      source_id: its source video.
      split: the split that all rows go to.
      rows: in their final order: question rows (see `export.check_row`), or reasoning paths (`cold_start`).
      rejected: what was left out, objects with at least "reason" and "detail"; "again" where the next run shall try
        once more.
    """

    clip_id: str
    source_id: str
    split: str
    rows: tuple[Mapping[str, Any], ...]
    rejected: tuple[Mapping[str, Any], ...] = ()


def _entry(reason: str, detail: str, again: bool) -> dict[str, Any]:
    return {"reason": reason, "detail": detail} | ({"again": True} if again else {})


def media_rejection(error: RecordError) -> dict[str, Any]:
    """Return what `ClipResult.rejected` says of media that cannot be used: they may be mended."""
    return _entry(error.reason, error.message, True)


LostObject = Mapping[str, str]  # an entry of `ClipResult.rejected`, as `lost_object` makes it


def lost_object(reason: str, object_id: str, caption: str, why: str) -> LostObject:
    """Return the entry of an object that no question is about: reason, object id, the caption's beginning, detail."""
    detail = f"{object_id}: {why}; its caption is {shown(caption)}"
    return {"reason": reason, "object_id": object_id, "caption": cut(caption, 80), "detail": detail}


WorkFn = Callable[[str], ClipResult]
CheckFn = Callable[[ClipResult], None]


def canonical_json(value: Any, name: str = "") -> bytes:
    """Encode UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
      StoreError: NaN, infinity, half a surrogate pair, or something that JSON does not have; begins with `name`.
    """
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{name}cannot be written as JSON: {error}") from error


def clip_file_name(clip_id: str) -> str:
    """Return a safe file name for any clip id, without suffix; different ids give different names."""
    name = quote(clip_id, safe="") if clip_id else ""
    if not name:
        raise StoreError("a clip id is empty")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:80]}~{hashlib.sha256(clip_id.encode()).hexdigest()}"
    return name


class PartStore:
    """The folder with the result files of one run. Use it in a `with` block: one run at a time may hold it.

    Attributes:
      folder: holds `run.json` (what the results were made with) and `parts/`.
      seed, config: of the run; they go into the manifest.
    """

    def __init__(self, folder: str | Path, *, seed: int, config: Mapping[str, Any]) -> None:
        """`config` is everything besides the seed that the results depend on, as JSON values."""
        self.folder, self.seed, self.config = Path(folder), seed, dict(config)
        self._parts = self.folder / "parts"
        self._lock: Any = None

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
          StoreError: another run holds it, or its results were made with another seed or config.
          StorageError: it cannot be written.
        """
        with storing(self.folder):
            self._parts.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(WriterLock.of(self.folder))
            except LockError as problem:
                raise StoreError(str(problem)) from None
            remove_partials(self._parts)
            self._check_run()
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _check_run(self) -> None:
        path, mine = self.folder / "run.json", canonical_json({"seed": self.seed, "config": self.config})
        if not path.exists():
            if any(self._parts.iterdir()):
                raise StoreError(f"{self._parts} has results but {path} is gone: use an empty folder")
            write_atomic(path, mine)
        elif path.read_bytes() != mine:
            raise StoreError(
                f"the results in {self.folder} were made with another seed or config (see {path}): use another folder, "
                "or delete this one to start over"
            )

    def path(self, clip_id: str) -> Path:
        return self._parts / f"{clip_file_name(clip_id)}.json"

    def has(self, clip_id: str) -> bool:
        return self.path(clip_id).exists()

    def settled(self, clip_id: str) -> bool:
        """Return whether a clip has a result that the next run need not try to better.

        Raises:
          StoreError: it is to be tried again by what it says, and is damaged. Others are told when they are read.
        """
        if not self.has(clip_id):
            return False
        if _AGAIN not in read_bytes(self.path(clip_id), _MAX_PART_BYTES):  # most are: so they need not be parsed
            return True
        return not any(entry.get("again") for entry in self.read(clip_id).rejected)

    def write(self, result: ClipResult) -> None:
        """Store a clip's result in one step."""
        value = {"format": PART_FORMAT} | dataclasses.asdict(result)
        write_atomic(self.path(result.clip_id), canonical_json(value, f"clip {result.clip_id!r}: "))

    def read(self, clip_id: str) -> ClipResult:
        """Read the stored result of a clip.

        Raises:
          StoreError: the file is missing, damaged, of another clip or of another format.
        """
        path = self.path(clip_id)
        if not path.exists():
            raise StoreError(f"{path} is missing: run the clip first")
        try:
            value = json.loads(read_bytes(path, _MAX_PART_BYTES))
            result = None
            if value.pop("format") == PART_FORMAT:
                result = ClipResult(**(value | {"rows": tuple(value["rows"]), "rejected": tuple(value["rejected"])}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path} is damaged ({error}): delete it and run again") from error
        if result is None:
            raise StoreError(f"{path} has another format version than {PART_FORMAT}: made by another release")
        if result.clip_id != clip_id:
            raise StoreError(f"{path} holds clip {result.clip_id!r}, not {clip_id!r}")
        return result


def process_clips(
    clip_ids: Sequence[str],
    work: WorkFn,
    store: PartStore,
    *,
    workers: int = 1,
    check: CheckFn | None = None,
) -> int:
    """Run `work` on every clip that has no result yet, or one to be tried again, and store what it gives.

    `work` must depend on nothing but the clip id and what it was made with (seed each clip's generator from its id),
    so that the number of workers and the order of clips leave no trace.

    Args:
      work: clip id -> ClipResult. A `ClipRejected` or a `RecordError` (unusable media) rejects the clip; anything else
        that it raises is a bug and ends the run, finished clips kept. With several workers it must be picklable.
      workers: processes; 1 runs in this one.
      check: called on every result before it is stored; `data_prep.store.export.check_result` for one.

    Returns:
      How many clips were done now; the others had been done before.

    Raises:
      StoreError: a clip id twice, a result for another clip, a worker process that died, whatever `check` finds.
    """
    twice = sorted(c for c, n in Counter(clip_ids).items() if n > 1)
    if twice:
        raise StoreError(f"clip ids must be unique, these are there twice: {twice[:5]}")
    pending = [c for c in clip_ids if not store.settled(c)]
    with tqdm(total=len(clip_ids), initial=len(clip_ids) - len(pending), unit="clip") as bar:
        if workers <= 1:
            for clip_id in pending:
                _do_clip(work, check, store, clip_id)
                bar.update()
        else:
            _run_pool(pending, work, check, store, workers, bar)
    return len(pending)


def _do_clip(work: WorkFn, check: CheckFn | None, store: PartStore, clip_id: str) -> None:
    try:
        result = work(clip_id)
    except ClipRejected as error:
        result = ClipResult(clip_id, error.source_id, "", (), (error.entry(),))
    except RecordError as error:
        result = ClipResult(clip_id, "", "", (), (media_rejection(error),))
    if result.clip_id != clip_id:
        raise StoreError(f"the work function was given clip {clip_id!r} and returned clip {result.clip_id!r}")
    if check is not None:
        check(result)
    store.write(result)


def _run_pool(
    pending: Iterable[str], work: WorkFn, check: CheckFn | None, store: PartStore, workers: int, bar: tqdm
) -> None:
    writer = PartStore(store.folder, seed=store.seed, config=store.config)  # the lock stays here, with the owner
    job = _Job(str(store.folder), work, check, writer)
    running: dict[Future, str] = {}
    todo = iter(pending)
    # Fresh interpreters: a fork would copy the locks of whatever threads this process has.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads,)) as pool:
        try:
            while True:
                while len(running) < 4 * workers and (clip_id := next(todo, None)) is not None:
                    running[pool.submit(_do_job, job, clip_id)] = clip_id
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    clip_id = running[future]
                    future.result()
                    del running[future]
                    bar.update()
        except BrokenProcessPool as error:
            raise StoreError(
                f"a worker process died, likely for lack of memory, on one of the clips {sorted(running.values())}; "
                "run again with fewer workers: finished clips are kept"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@dataclasses.dataclass(frozen=True)
class _Job:
    """What `_run_pool` asks of its workers, the same with every clip; the folder of the results tells jobs apart."""

    folder: str
    work: WorkFn = dataclasses.field(compare=False)
    check: CheckFn | None = dataclasses.field(compare=False)
    store: PartStore = dataclasses.field(compare=False)


def _do_job(job: _Job, clip_id: str) -> None:
    job = _first(job)
    _do_clip(job.work, job.check, job.store, clip_id)


@functools.lru_cache(maxsize=1)
def _first(job: _Job) -> _Job:
    """The job as it came with a worker's first clip: the decoders that its work has started serve all clips."""
    return job


def _begin(threads: int) -> None:
    """Lets OpenCV use `threads`, and ends this worker when its parent is gone: after kill -9 nobody goes on writing."""
    cv2.setNumThreads(threads)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
