"""The data set as TFDS shards of ArrayRecords, without TensorFlow: one example per clip, its frames stored once.

Twenty questions about a clip share its frames here, and a reader has random access to clips:

    builder = tfds.builder_from_directory(folder)            # .../mllm4d/1.0.0
    source = builder.as_data_source("train")                 # len(source), source[i]; feed it to Grain

A shard is a function of its clip ids alone. Whether one process writes all shards or Beam workers write them, in
whatever order, the files have the same bytes; Beam moves no frames between workers, since no example has to be shuffled
to its shard. (TFDS's `GeneratorBasedBuilder` cuts shards at other clips with Beam than without.)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

from data_prep.sources.frames import encode_jpeg
from data_prep.store.export import MANIFEST
from data_prep.store.parts import PartStore, StoreError, canonical_json
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import resolve_media

TFDS_FOLDER = "tfds"
_CLIPS_PER_SHARD = 256  # TFDS holds a shard in memory while writing it: 256 clips of 32 frames at 224 x 224 are 80 MB
SOURCE_NOTE = "source.json"


@dataclasses.dataclass(frozen=True)
class ClipExample:
    """One clip with its questions.

    Attributes:
      clip_id, source_id, video: as in the question rows; `video` is the path below the media root.
      frames: T JPEG files.
      frame_indices: i64[T], their frame numbers in the source clip.
      timestamps: f64[T], seconds at which they show in it.
      fps: frames per second of the source clip.
      num_source_frames: frames that it has.
      questions: the question rows.
    """

    clip_id: str
    source_id: str
    video: str
    frames: tuple[bytes, ...]
    frame_indices: np.ndarray
    timestamps: np.ndarray
    fps: float
    num_source_frames: int
    questions: tuple[Mapping[str, Any], ...]


LoadFn = Callable[[str], ClipExample]
Shards = Mapping[str, Sequence[Sequence[str]]]  # split -> clip ids of each shard


@dataclasses.dataclass(frozen=True)
class PartLoader:
    """Loads clips from part files and their videos; the usual `load` of `build_dataset`. Picklable."""

    store_folder: Path  # that of the `PartStore`
    media_root: Path  # what the rows' "video" paths are relative to
    sample: SampleRule  # which frames are kept; the rule that the questions number frames by
    resize: ResizeRule | None = None  # size of the kept frames; None keeps the source's
    quality: int = 95  # of the JPEG files, 1-100
    pool: DecodePool = dataclasses.field(default_factory=DecodePool)  # decodes under a time limit
    chosen: Mapping[str, Sequence[str]] | None = None  # clip id -> ids of the questions that are kept; None keeps all

    def __call__(self, clip_id: str) -> ClipExample:
        """Load a clip. Raises StoreError (part or video unusable), naming the clip."""
        result = PartStore(self.store_folder, seed=0, config={}).read(clip_id)
        videos = {row["video"] for row in result.rows}
        if len(videos) != 1:
            raise StoreError(f"clip {clip_id!r} needs questions about one video, it has {sorted(videos)}")
        video, rows = videos.pop(), result.rows
        if self.chosen is not None:
            rows = tuple(row for row in rows if row["id"] in self.chosen[clip_id])
        try:
            clip = self.pool.read(resolve_media(self.media_root, video), self.sample, self.resize)
        except RecordError as error:
            raise StoreError(
                f"clip {clip_id!r}: {error}. Mend its video, or take its files out of the input folder, and run again: "
                "what is done for other clips is kept"
            ) from error
        frames = tuple(encode_jpeg(frame, self.quality) for frame in clip.frames)
        times = (clip.indices, clip.times, clip.source_fps, clip.total_frames)
        return ClipExample(clip_id, result.source_id, video, frames, *times, rows)


def clips_by_split(store: PartStore, clip_ids: Iterable[str]) -> dict[str, list[str]]:
    """Return split -> ids of its clips that have questions."""
    splits: dict[str, list[str]] = {}
    for clip_id in sorted(clip_ids):
        result = store.read(clip_id)
        if result.rows:
            splits.setdefault(result.split, []).append(clip_id)
    return splits


def plan_shards(clip_ids: Sequence[str], clips_per_shard: int) -> list[tuple[str, ...]]:
    """Cut clips into shards of equal size (give or take one), in the order of a hash of their ids.

    The hash mixes source videos, whose clips have similar ids, over shards; a shard is a fair sample of the split.

    Raises:
      StoreError: no clips, or `clips_per_shard` below 1.
    """
    if not clip_ids or clips_per_shard < 1:
        raise StoreError(f"{len(clip_ids)} clips cannot be cut into shards of {clips_per_shard}")
    order = sorted(clip_ids, key=lambda c: (hashlib.sha256(c.encode()).digest(), c))
    count = -(-len(order) // clips_per_shard)
    cuts = [len(order) * i // count for i in range(count + 1)]
    return [tuple(order[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def encode_example(example: ClipExample) -> dict[str, Any]:
    """Return the example as the features of `ClipDataset` take it.

    Raises:
      StoreError: frames, their numbers and times do not match, or the rate is not positive.
    """
    counts = [len(part) for part in (example.frames, example.frame_indices, example.timestamps)]
    if not (len(set(counts)) == 1 and counts[0] and example.fps > 0):
        told = "{} frames, {} frame indices, {} times".format(*counts)
        raise StoreError(f"clip {example.clip_id!r}: {told}, {example.fps} frames per second")
    questions = [
        {"id": row["id"], "question_type": row["question_type"], "answer": row["answer"], "row": canonical_json(row)}
        for row in example.questions
    ]
    timestamps = np.asarray(example.timestamps, np.float64)
    return {
        "clip_id": example.clip_id,
        "source_id": example.source_id,
        "video": example.video,
        "fps": example.fps,
        "timing": canonical_json({"fps": float(example.fps), "timestamps": timestamps.tolist()}),
        "num_source_frames": example.num_source_frames,
        "frames": list(example.frames),
        "frame_indices": np.asarray(example.frame_indices, np.int64),
        "timestamps": timestamps,
        "questions": questions,
    }


def _generate_examples(load: LoadFn, clip_ids: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, example) of the clips of one shard, in order. Runs in this process or in a Beam worker."""
    for clip_id in clip_ids:
        yield clip_id, encode_example(load(clip_id))


class _SortedWriter(ExampleWriter):
    """Writes each record with its fields in a fixed order; protobuf itself orders them anew in every process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        parse = tf_example_pb2.Example.FromString
        return super().write(path, ((key, parse(data).SerializeToString(deterministic=True)) for key, data in examples))


class ClipDataset(tfds.core.ShardBasedBuilder):
    """TFDS builder of a data set of clips. `build_dataset` is the way to run it.

    Features: clip_id, source_id, video (text); fps f32; num_source_frames i64; frames (T JPEG files as bytes, so that a
    reader decodes those it needs, where it likes); frame_indices i64[T]; timestamps f32[T] in seconds; questions, a
    sequence of id, question_type, answer and row (the whole question row as JSON). Text comes back as bytes. Records of
    this kind hold no float64 (TFDS rounds what is declared as such), hence also "timing", the exact rate and timestamps
    as JSON: {"fps", "timestamps"}.
    """

    name = "mllm4d"
    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums to look up beside the code. TFDS 4.9.10 does that look-up with a
    # package that it does not list among its requirements (importlib_resources).
    code_path = None

    def __init__(
        self, shards: Shards, load: LoadFn, data_dir: str | Path, fingerprint: str, questions: Mapping[str, int] | None
    ) -> None:
        """See `build_dataset`."""
        self._fingerprint, self._questions = fingerprint, None if questions is None else dict(questions)
        self._shards, self._load = {split: list(shards[split]) for split in sorted(shards)}, load
        super().__init__(file_format="array_record", data_dir=str(data_dir))

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            "clip_id": text,
            "source_id": text,
            "video": text,
            "fps": np.float32,
            "timing": text,
            "num_source_frames": np.int64,
            "frames": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
            "frame_indices": tfds.features.Sequence(np.int64),
            "timestamps": tfds.features.Sequence(np.float32),
            "questions": tfds.features.Sequence({"id": text, "question_type": text, "answer": text, "row": text}),
        }
        about = "Clips with questions about the 4D relations of camera and objects, answered from metric geometry."
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, description=about, features=features)

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable[[], Iterator]]]:
        del dl_manager  # nothing is downloaded
        return {s: [partial(_generate_examples, self._load, ids) for ids in self._shards[s]] for s in self._shards}

    def _example_writer(self) -> ExampleWriter:
        return _SortedWriter(self.info.file_format)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        # With Beam, TFDS 4.9.10 sorts shard numbers as texts ("10" before "2") and mixes up the lengths of shards.
        infos = [s.replace(shard_lengths=[len(ids) for ids in self._shards[s.name]]) for s in self.info.splits.values()]
        self.info.set_splits(tfds.core.splits.SplitDict(infos))
        Path(self.data_dir, SOURCE_NOTE).write_bytes(self.source_note())

    def source_note(self) -> bytes:
        """Return what the data set is made from, as the file that stands beside its shards says it."""
        return canonical_json({"fingerprint": self._fingerprint, "shards": self._shards, "questions": self._questions})


def build_dataset(
    folder: str | Path,
    splits: Mapping[str, Sequence[str]],
    load: LoadFn,
    *,
    clips_per_shard: int = _CLIPS_PER_SHARD,
    fingerprint: str = "",
    questions: Mapping[str, int] | None = None,
    runner: str | None = None,
    runner_options: Sequence[str] = (),
) -> ClipDataset:
    """Write `<folder>/mllm4d/1.0.0`, or only open it when it is there already and was made from the same.

    TFDS writes into a folder `incomplete.*` and renames it at the end, so a killed build leaves no half data set; run
    it again, and delete the `incomplete.*` folder it left.

    Args:
      splits: split -> clip ids (`clips_by_split`).
      load: clip id -> ClipExample; picklable when a runner is named.
      fingerprint: of everything that `load` depends on (the sha256 of the manifest, say), to tell a data set made from
        something else apart.
      questions: clip id -> how many questions it has, if known; readers then need not open every clip to count them.
      runner: None writes all shards in this process; otherwise the name of a Beam runner ("FnApiRunner" runs on this
        machine, "FlinkRunner", "SparkRunner", "DataflowRunner" elsewhere), one task per shard. Remote workers must
        see `folder`, the parts and the videos under the same paths.
      runner_options: command-line options of that runner, for example "--flink_master=host:8081".

    Returns:
      The builder; `as_data_source(split)` reads.

    Raises:
      StoreError: no clips, an unusable clip, a data set of something else in the folder, or Beam is asked for and not
        installed.
    """
    shards = {split: plan_shards(clip_ids, clips_per_shard) for split, clip_ids in splits.items()}
    if not shards:
        raise StoreError("no clip has a question: there is nothing to write")
    options = _beam_config(runner, runner_options)
    builder = ClipDataset(shards, load, folder, fingerprint, questions)
    source = Path(builder.data_dir) / SOURCE_NOTE
    if source.exists() and source.read_bytes() != builder.source_note():
        raise StoreError(f"{source.parent} was made from other clips: delete it, or build into another folder")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**options))
    if runner is not None:
        for leftover in Path(builder.data_dir).glob("*.shard_infos.json"):
            leftover.unlink()  # only Beam leaves these behind
    return builder


def _beam_config(runner: str | None, runner_options: Sequence[str]) -> dict[str, Any]:
    if runner is None:
        if runner_options:
            raise StoreError(f"runner options {list(runner_options)} without a runner: name one, e.g. FnApiRunner")
        return {}
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise StoreError(
            f"the runner {runner} needs Apache Beam, which is not installed: pip install 'apache-beam>=2.77,<3' "
            "(it holds protobuf back, so an environment of its own is best), or leave the runner out"
        ) from error
    return {"beam_runner": runner, "beam_options": PipelineOptions(list(runner_options))}


def write_dataset(
    config: ml_collections.ConfigDict,
    root: Path,
    media_root: Path,
    store: PartStore,
    chosen: Mapping[str, Sequence[str]],
) -> None:
    """Write the chosen questions of a curation and their clips' frames as `<root>/tfds`.

    Args:
      chosen: clip id -> ids of its questions.

    Raises:
      StoreError: the folder is there but made from something else, or Beam is missing.
    """
    options = config.tfds
    # The encoder's own rule: frames that already fit its budget are not resampled again.
    resize = ResizeRule("per_frame", options.factor, 2, 784, options.max_pixels) if options.max_pixels else None
    sample, pool = SampleRule("uniform", config.questions.num_frames, None), DecodePool(config.decode_timeout_s)
    manifest = hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()
    built = build_dataset(
        root / TFDS_FOLDER,
        clips_by_split(store, chosen),
        PartLoader(store.folder, media_root, sample, resize, options.jpeg_quality, pool, chosen),
        clips_per_shard=options.clips_per_shard,
        questions={clip_id: len(ids) for clip_id, ids in chosen.items()},
        fingerprint=f"{manifest} {options.max_pixels} {options.factor} {options.jpeg_quality}",
        runner=options.runner or None,
        runner_options=tuple(options.runner_options),
    )
    print(f"data set: {built.data_dir}")
