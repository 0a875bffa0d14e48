"""Batches for training: a fixed global order of records, encoded, checked and padded to few static shapes.

The order is a pure function of (seed, position): Grain shuffles each epoch anew by an indexed permutation. The
position, a count of records since the start of the run, bad ones included, is the whole state of the loader; a
checkpoint holds it and nothing of Grain's.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.data.records import RecordFile
from mllm4d_jax.processing.batch import ModelInputs, collate
from mllm4d_jax.processing.encode import Encoder
from mllm4d_jax.processing.errors import RecordError
from mllm4d_jax.processing.example import Example
from mllm4d_jax.processing.grids import VisionGeometry

CACHE_BYTES = 256 << 20


class LoaderError(ValueError):
    """The loader's settings cannot work."""


class TrainBatch(NamedTuple):
    """What one training step consumes; a pytree of NumPy arrays.

    Attributes:
      inputs: the padded rows.
      loss_index: i32[M] flat position `row * S + s` of each hidden state that predicts a supervised token.
      loss_target: i32[M] the token at `s + 1` of that row.
      loss_weight: f32[M] 1 for a supervised token, 0 for padding of M.
    """

    inputs: ModelInputs
    loss_index: np.ndarray
    loss_target: np.ndarray
    loss_weight: np.ndarray


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """A batch and what the run must know about it.

    Attributes:
      batch: the arrays.
      keys: record keys of the rows.
      position, rejected: the loader's state after this batch.
      tokens: real tokens in it; `slots` is B * S, the difference is padding.
      supervised: tokens that are training targets.
    """

    batch: TrainBatch
    keys: tuple[str, ...]
    position: int
    rejected: int
    tokens: int
    slots: int
    supervised: int


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Everything that fixes the shapes of a batch.

    Attributes:
      batch_size: rows B.
      length_buckets: allowed S, ascending.
      geometry: of the vision tower.
      visual_token_ids: image and video placeholder ids.
      shards: the number of frames is padded to a multiple of this, so that they can be split over devices.
    """

    batch_size: int
    length_buckets: tuple[int, ...]
    geometry: VisionGeometry
    visual_token_ids: tuple[int, ...]
    shards: int = 1

    def __post_init__(self) -> None:
        if not self.length_buckets or list(self.length_buckets) != sorted(set(self.length_buckets)):
            raise LoaderError(f"data.length_buckets must be ascending and not empty, got {self.length_buckets}")


def bucket(n: int, per_octave: int) -> int:
    """The smallest allowed size >= n, where each power of two up to the next is divided into `per_octave` steps."""
    if n <= per_octave:
        return n
    step = max(1, (1 << (n - 1).bit_length() - 1) // per_octave)
    return -(-n // step) * step


def make_batch(examples: Sequence[Example], layout: BatchLayout) -> TrainBatch:
    """Pads examples to the layout's buckets and lists the supervised positions.

    Raises:
      LoaderError: an example is longer than the largest length bucket.
    """
    longest = max(len(e.tokens) for e in examples)
    length = next((size for size in layout.length_buckets if size >= longest), None)
    if length is None:
        key = next(e.key for e in examples if len(e.tokens) == longest)
        raise LoaderError(f"{key} has {longest} tokens, more than the largest of data.length_buckets")
    grids = [g for e in examples for g in e.grids]
    frames = patches = None
    if grids:
        frames = -(-bucket(sum(g.t for g in grids), 2) // layout.shards) * layout.shards
        m2 = layout.geometry.merge_size**2
        patches = bucket(max(g.h * g.w for g in grids) // m2, 4) * m2
    inputs = collate(
        examples,
        layout.geometry,
        visual_token_ids=layout.visual_token_ids,
        length=length,
        frames=frames,
        frame_patches=patches,
    )
    return TrainBatch(inputs, *_supervision(examples, length))


def _supervision(examples: Sequence[Example], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # The first token of a row has nothing before it that could predict it.
    targets = [np.flatnonzero(e.supervised[1:]) + 1 for e in examples]
    index = np.concatenate([row * length + t - 1 for row, t in enumerate(targets)])
    target = np.concatenate([e.tokens[t] for e, t in zip(examples, targets, strict=True)])
    padding = (0, max(16, bucket(len(index), 2)) - len(index))
    weight = np.pad(np.ones(len(index), np.float32), padding)
    return np.pad(index, padding).astype(np.int32), np.pad(target, padding).astype(np.int32), weight


class ExampleCache:
    """Least recently used examples, bounded by the bytes of their arrays."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._items: OrderedDict[int, Example] = OrderedDict()

    def get(self, index: int) -> Example | None:
        if index in self._items:
            self._items.move_to_end(index)
        return self._items.get(index)

    def put(self, index: int, example: Example) -> None:
        size = _nbytes(example)
        if size > self.max_bytes or index in self._items:
            return
        self._items[index] = example
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, dropped = self._items.popitem(last=False)
            self.bytes -= _nbytes(dropped)


def _nbytes(example: Example) -> int:
    return sum(a.nbytes for a in (example.tokens, example.positions, example.supervised, example.patches))


class Loader:
    """Yields `LoadedBatch`es from a position on, without end."""

    def __init__(
        self,
        records: RecordFile,
        encoder: Encoder,
        layout: BatchLayout,
        quarantine: Quarantine,
        *,
        seed: int,
        position: int = 0,
        cache: ExampleCache | None = None,
    ) -> None:
        """
        Args:
          records: where examples come from.
          encoder: record -> Example.
          layout: shapes of the batches.
          quarantine: where unusable records go.
          seed: of the order.
          position: records consumed before this point of the run.
          cache: encoded examples kept for later epochs; None for the default size.
        """
        if not len(records):
            raise LoaderError(f"{records.path} holds no records")
        self.records, self.encoder, self.layout, self.quarantine = records, encoder, layout, quarantine
        self.position = position
        self._cache = ExampleCache() if cache is None else cache
        # Grain adds the epoch number to the seed; hashed first, neighbouring seeds do not share epochs.
        order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.order = grain.MapDataset.range(len(records)).shuffle(seed=order_seed).repeat()

    def next_batch(self, stop: threading.Event | None = None) -> LoadedBatch | None:
        """The next batch; None when `stop` was set before it was complete (the loader is then of no further use).

        Raises:
          QuarantineError: too many records are unusable.
        """
        examples: list[Example] = []
        skipped = 0
        while len(examples) < self.layout.batch_size:
            if stop is not None and stop.is_set():
                return None
            index = self.order[self.position]
            self.position += 1
            example = self._example(index)
            if example is not None:
                examples.append(example)
                continue
            self.quarantine.count(self.position)
            skipped += 1
            if skipped > 2 * len(self.records):  # more than a whole epoch, wherever in one it began
                raise QuarantineError(f"not one usable record in {self.records.path}; see {self.quarantine.path}")
        batch = make_batch(examples, self.layout)
        return LoadedBatch(
            batch=batch,
            keys=tuple(e.key for e in examples),
            position=self.position,
            rejected=self.quarantine.rejected,
            tokens=sum(len(e.tokens) for e in examples),
            slots=batch.inputs.tokens.size,
            supervised=int(batch.loss_weight.sum()),
        )

    def _example(self, index: int) -> Example | None:
        """Record `index` encoded, or None when it is quarantined."""
        if index in self.quarantine:
            return None
        example = self._cache.get(index)
        if example is not None:
            return example
        try:
            example = self._encode(index)
            if not example.supervised[1:].any():
                raise RecordError("holds no assistant text, so there is nothing to learn from it", "no_target")
        except RecordError as error:
            self.quarantine.add(index, error.with_key(self.records.key(index)))
            return None
        self._cache.put(index, example)
        return example

    def _encode(self, index: int) -> Example:
        try:
            return self.encoder.encode(self.records[index])
        except RecordError as error:
            if error.reason != "decoder_crash":
                raise
        # A decoder can die of a signal or of memory running out, which is not the record's fault: one more try.
        return self.encoder.encode(self.records[index])


class Prefetcher:
    """Runs a loader one batch ahead in a thread. Use as a context manager; the thread ends with it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._queue: queue.Queue = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()  # bounded: a record in decoding ends at its time limit

    def poll(self, timeout: float) -> LoadedBatch | None:
        """The next batch, or None when it is not there after `timeout` seconds; re-raises what the loader raised."""
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            while (item := self._loader.next_batch(self._stop)) is not None and self._put(item):
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
