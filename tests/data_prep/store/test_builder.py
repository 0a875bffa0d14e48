"""The TFDS data set: read back and compared, its bytes, and Beam where it is installed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep.sources.frames import encode_jpeg
from data_prep.store import builder as builder_module
from data_prep.store.builder import (
    ClipExample,
    PartLoader,
    build_dataset,
    clips_by_split,
    encode_example,
    plan_shards,
)
from data_prep.store.parts import ClipResult, PartStore, StoreError
from mllm4d_jax.media.frame_sampling import SampleRule

ROOT = Path(__file__).resolve().parents[3]
FEATURES = {
    "clip_id",
    "source_id",
    "video",
    "fps",
    "num_source_frames",
    "frames",
    "frame_indices",
    "timestamps",
    "timing",
}


def frame(seed, height=16, width=24):
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (4, 6, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def make_example(salt, clip_id):
    """A clip as a pure function of its id; clip n has n % 4 questions and 2 + n % 3 frames."""
    n = int(clip_id[1:])
    rows = tuple(
        {"id": f"{clip_id}#{i}", "question_type": "t", "question": f"Où {i}?", "answer": "B", "options": ["1", "2"]}
        | {"solution": {"camera_center": [None, [0.1, -2.5, i]], "object_center": []}}
        for i in range(n % 4)
    )
    frames = tuple(encode_jpeg(frame([salt, n, t])) for t in range(2 + n % 3))
    indices = 3 * np.arange(len(frames)) + 1
    return ClipExample(clip_id, f"s{n // 2}", f"{clip_id}.mp4", frames, indices, indices / 29.97, 29.97, 40, rows)


LOAD = functools.partial(make_example, 0)
CLIPS = [f"c{n}" for n in range(25)]
SPLITS = {"train": CLIPS[:23], "bench": CLIPS[23:]}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_read_back_is_what_was_written(tmp_path):
    build_dataset(tmp_path, SPLITS, LOAD, clips_per_shard=2)
    reader = tfds.builder_from_directory(tmp_path / "mllm4d" / "1.0.0")
    source = reader.as_data_source("train")
    assert len(source) == 23 and len(reader.as_data_source("bench")) == 2
    order = [clip for shard in plan_shards(SPLITS["train"], 2) for clip in shard]
    for i in (0, 1, 7, 22):
        example, wanted = source[i], LOAD(order[i])
        assert set(example) == FEATURES | {"questions"}
        assert example["clip_id"].decode() == order[i]
        assert example["source_id"].decode() == wanted.source_id and example["video"].decode() == wanted.video
        assert example["fps"] == np.float32(29.97) and example["num_source_frames"] == 40
        np.testing.assert_array_equal(example["frame_indices"], wanted.frame_indices)
        timing = json.loads(example["timing"])
        assert timing["fps"] == 29.97
        np.testing.assert_array_equal(timing["timestamps"], np.array(wanted.frame_indices) / 29.97)
        np.testing.assert_array_equal(example["timestamps"], np.array(timing["timestamps"], np.float32))
        assert [json.loads(row) for row in example["questions"]["row"]] == list(wanted.questions)
        assert [a.decode() for a in example["questions"]["answer"]] == ["B"] * len(wanted.questions)
        assert list(example["frames"]) == list(wanted.frames)


def test_another_process_writes_the_same_bytes(tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from tests.data_prep.store.test_builder import *;"
        "build_dataset(sys.argv[1], SPLITS, LOAD, clips_per_shard=9)"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name), str(ROOT)], check=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_every_clip_is_there_once_and_frames_once(tmp_path):
    built = build_dataset(tmp_path, SPLITS, LOAD, clips_per_shard=4)
    found = [e["clip_id"].decode() for split in SPLITS for e in built.as_data_source(split)]
    assert sorted(found) == sorted(CLIPS)
    stored = b"".join(data for name, data in files(tmp_path).items() if "array_record" in name)
    assert len(stored) > 0 and not list(tmp_path.rglob("incomplete*"))
    shards = [len(s) for s in plan_shards(SPLITS["train"], 4)]
    assert list(built.info.splits["train"].shard_lengths) == shards and max(shards) - min(shards) <= 1


def test_the_same_clips_give_the_same_bytes(tmp_path):
    for name, splits in (("a", SPLITS), ("b", {s: ids[::-1] for s, ids in reversed(SPLITS.items())})):
        build_dataset(tmp_path / name, splits, LOAD, clips_per_shard=4)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    build_dataset(tmp_path / "c", SPLITS, functools.partial(make_example, 1), clips_per_shard=4)
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_a_finished_data_set_is_opened_and_one_of_other_clips_refused(tmp_path):
    build_dataset(tmp_path, SPLITS, LOAD, fingerprint="1")
    before = files(tmp_path)
    again = build_dataset(tmp_path, SPLITS, lambda _: pytest.fail("written anew"), fingerprint="1")
    assert files(tmp_path) == before and len(again.as_data_source("train")) == 23
    for splits, fingerprint in ((SPLITS, "2"), ({"train": CLIPS[:5]}, "1")):
        with pytest.raises(StoreError, match="made from other clips"):
            build_dataset(tmp_path, splits, LOAD, fingerprint=fingerprint)


def test_shards_are_fair_and_cover_every_clip():
    clips = [f"video{n // 20:03d}_{n}" for n in range(2000)]
    shards = plan_shards(clips, 100)
    assert sorted(c for s in shards for c in s) == sorted(clips) and {len(s) for s in shards} == {100}
    assert min(len({c.split("_")[0] for c in s}) for s in shards) > 50  # unmixed it would be 5
    assert plan_shards(clips[::-1], 100) == shards
    for ids, size in (([], 4), (["a"], 0)):
        with pytest.raises(StoreError):
            plan_shards(ids, size)


def test_bad_examples_are_named(tmp_path):
    good = LOAD("c3")
    for changes in ({"frames": good.frames[1:]}, {"fps": 0.0}, {"frames": (), "frame_indices": np.zeros(0)}):
        with pytest.raises(StoreError, match="'c3'"):
            encode_example(dataclasses.replace(good, **changes))
    with pytest.raises(StoreError, match="nothing to write"):
        build_dataset(tmp_path, {}, LOAD)


def write_video(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (frames.shape[2], frames.shape[1]))
    for picture in frames:
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()


def test_parts_and_videos_become_examples(tmp_path):
    frames = np.stack([np.full((32, 48, 3), 20 * t, np.uint8) for t in range(12)])
    write_video(tmp_path / "v.mp4", frames)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    row = {"id": "c#0", "question_type": "t", "answer": "A", "video": "v.mp4"}
    with PartStore(tmp_path / "work", seed=0, config={}) as store:
        store.write(ClipResult("c", "s", "train", (row,)))
        store.write(ClipResult("empty", "s", "train", ()))
        store.write(ClipResult("bad", "s", "bench", (row | {"video": "bad.mp4"},)))
        store.write(ClipResult("out", "s", "bench", (row | {"video": "../v.mp4"},)))
        store.write(ClipResult("two", "s", "bench", (row, row | {"video": "w.mp4"})))
        splits = clips_by_split(store, ["out", "empty", "c", "bad"])
    assert splits == {"train": ["c"], "bench": ["bad", "out"]}
    load = PartLoader(tmp_path / "work", tmp_path, SampleRule("qwen3_vl", 4, None))
    example = load("c")
    assert example.fps == 10.0 and example.num_source_frames == 12 and len(example.frames) == 4
    for index, data in zip(example.frame_indices, example.frames, strict=True):
        level = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).mean()
        assert abs(level - 20 * index) < 6
    for clip, says in (
        ("bad", "not a video"),
        ("out", "leaves the media root"),
        ("two", "one video"),
        ("no", "missing"),
    ):
        with pytest.raises(StoreError, match=says):
            load(clip)
    load.pool.close()


def test_writing_and_reading_need_neither_tensorflow_nor_jax(tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_builder import LOAD, SPLITS, build_dataset\n"
        "assert len(build_dataset(sys.argv[1], SPLITS, LOAD).as_data_source('train')[2]['frames']) > 1\n"
        "assert not {'tensorflow', 'jax', 'apache_beam'} & set(sys.modules)"
    )
    args = [sys.executable, "-c", code, str(tmp_path), str(ROOT), str(ROOT / "tests" / "data_prep" / "store")]
    subprocess.run(args, check=True, timeout=60, capture_output=True)


def test_beam_that_is_not_installed_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    with pytest.raises(StoreError, match="FnApiRunner needs Apache Beam.*pip install"):
        build_dataset(tmp_path, SPLITS, LOAD, runner="FnApiRunner")
    with pytest.raises(StoreError, match="without a runner"):
        build_dataset(tmp_path, SPLITS, LOAD, runner_options=["--direct_num_workers=2"])


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is an extra")
@pytest.mark.parametrize("options", [[], ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]])
def test_beam_gives_the_same_bytes(tmp_path, options):
    clips = [f"c{n}" for n in range(34)]
    lengths = [len(s) for s in plan_shards(clips, 3)]
    # Sorting shard numbers as texts would show: there are more than ten, and a short one in the middle.
    assert len(lengths) > 10 and [lengths[int(n)] for n in sorted(map(str, range(len(lengths))))] != lengths
    build_dataset(tmp_path / "plain", {"train": clips}, LOAD, clips_per_shard=3)
    built = build_dataset(
        tmp_path / "beam", {"train": clips}, LOAD, clips_per_shard=3, runner="FnApiRunner", runner_options=options
    )
    assert files(tmp_path / "plain") == files(tmp_path / "beam")
    assert [e["clip_id"].decode() for e in built.as_data_source("train")] == [
        c for s in plan_shards(clips, 3) for c in s
    ]


def test_the_note_beside_the_shards_says_what_they_are_made_from(tmp_path):
    build_dataset(tmp_path, SPLITS, LOAD, clips_per_shard=4, fingerprint="abc")
    note = json.loads((tmp_path / "mllm4d" / "1.0.0" / builder_module.SOURCE_NOTE).read_bytes())
    assert note["fingerprint"] == "abc" and sorted(c for s in note["shards"]["train"] for c in s) == sorted(CLIPS[:23])
