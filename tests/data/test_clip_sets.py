"""TFDS sets written by data_prep, read as records and through the real encoder."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.store.builder import ClipExample, build_dataset
from mllm4d_jax.data.clip_sets import ClipSet
from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.data.sources import Questions, open_source
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import QWEN_SPECIAL_IDS, Tokenizer, build_byte_level_tokenizer
from mllm4d_jax.qa.errors import RecordError
from tests.buckets import put_folder
from tests.encode.decoding import in_process

ROOT = Path(__file__).resolve().parents[2]
IDS = (151655, 151656, 151652, 151653)


def jpeg(seed):
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    return cv2.imencode(".jpg", cv2.resize(noise, (64, 48)))[1].tobytes()


def make_clip(clip_id):
    """Clip n has n questions; clip c4's second question is broken and clip c5 has a damaged frame."""
    n = int(clip_id[1:])
    rows = []
    for i in range(n):
        said = [{"from": "human", "value": f"<video>\nWhat moves {i}?"}, {"from": "gpt", "value": "B"}]
        if (n, i) == (4, 1):
            said[0]["from"] = "judge"
        rows.append({"id": f"{clip_id}#{i}", "question_type": "t", "answer": "B", "video": f"{clip_id}.mp4"})
        rows[-1]["conversations"] = said
    frames = [jpeg([n, t]) for t in range(4)]
    if n == 5:
        frames[2] = frames[2][:40]
    indices = np.array([0, 10, 20, 30])
    times = indices / 29.97 + 0.011
    return ClipExample(clip_id, "s", f"{clip_id}.mp4", tuple(frames), indices, times, 29.97, 31, tuple(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("set")
    build_dataset(base, {"train": [f"c{n}" for n in range(7)], "bench": ["c2"]}, make_clip, clips_per_shard=3)
    return base / "mllm4d" / "1.0.0"


@pytest.fixture(scope="module")
def encoder():
    half = (0.5, 0.5, 0.5)
    config = ProcessorConfig("qwen3_vl", 16, 2, 2, half, half, 65536, 16777216, 4096, 25165824, 0.0, *IDS)
    words = ["user assistant <0.3 seconds> What moves?"] * 3
    tokenizer = Tokenizer(build_byte_level_tokenizer(words, 400, QWEN_SPECIAL_IDS))
    return in_process(config, tokenizer, VideoOptions(num_frames=8))


def test_questions_are_records_and_clips_their_groups(folder):
    source = open_source(folder, "")
    assert isinstance(source, ClipSet) and len(source) == 21 and source.clips.dtype == np.int32
    sizes = np.bincount(source.clips)
    assert sorted(sizes[sizes > 0]) == [1, 2, 3, 4, 5, 6] and np.all(np.diff(source.clips) >= 0)
    texts = set()
    for i in range(len(source)):
        if sizes[source.clips[i]] == 4:
            continue
        record = source[i]
        video, question = record.messages[0]["content"]
        assert record.key == f"mllm4d@train#{i}" and record.messages[1]["content"] == "B"
        stored = video["frames"]
        assert (stored.source_fps, stored.total_frames, stored.indices) == (29.97, 31, (0, 10, 20, 30))
        texts.add((stored.name, question["text"]))
        n = int(sizes[source.clips[i]])
        assert n == 5 or stored.jpegs == tuple(jpeg([n, t]) for t in range(4))
    assert len(texts) == 17  # no two alike
    assert len(open_source(f"{folder}@bench", "")) == 2


def test_a_set_goes_through_the_encoder_with_exact_times_and_its_bad_records_are_named(folder, encoder):
    source = ClipSet(folder)
    groups = GroupEncoder([source], encoder)
    sizes = np.bincount(source.clips)
    for clip in np.unique(source.clips):
        records = np.flatnonzero(source.clips == clip)
        found = groups(Questions(0, tuple(int(i) for i in records)))
        reasons = [e.reason if isinstance(e, RecordError) else "" for e in found.results.values()]
        if sizes[clip] == 5:
            assert reasons == ["undecodable_frame"] * 5
            continue
        assert reasons == (["", "unknown_role", "", ""] if sizes[clip] == 4 else [""] * sizes[clip])
        examples = found.examples
        assert len({id(e.patches) for e in examples}) == 1
        # The mean times of frames 0, 10 and 20, 30 at 29.97 frames per second.
        np.testing.assert_allclose(examples[0].timestamps[0], [5 / 29.97 + 0.011, 25 / 29.97 + 0.011], rtol=1e-12)


def test_the_system_prompt_and_the_way_to_another_process(folder):
    source = ClipSet(folder, "bench", "Be brief.")
    other = pickle.loads(pickle.dumps(source))
    assert other[1] == source[1] and other[1].messages[0] == {"role": "system", "content": "Be brief."}


def test_the_digest_follows_the_set(folder, tmp_path):
    copies = []
    for name, questions in (("a", ["c2", "c3"]), ("b", ["c2", "c3"]), ("c", ["c2", "c4"])):
        build_dataset(tmp_path / name, {"train": questions}, make_clip)
        copies.append(ClipSet(tmp_path / name / "mllm4d" / "1.0.0").digest)
    assert copies[0] == copies[1] != copies[2]


def test_questions_that_the_builder_counted_are_not_counted_again(folder, tmp_path, monkeypatch):
    clips = [f"c{n}" for n in range(7)]
    build_dataset(tmp_path, {"train": clips}, make_clip, clips_per_shard=3, questions={c: int(c[1:]) for c in clips})
    noted = tmp_path / "mllm4d" / "1.0.0"
    with monkeypatch.context() as patch:
        patch.setattr("logging.Logger.info", lambda *_: pytest.fail("it counts"))
        found = ClipSet(noted)
    np.testing.assert_array_equal(found.clips, ClipSet(folder).clips)
    note = json.loads((noted / "source.json").read_text())
    note["questions"]["c3"] = 2
    (noted / "source.json").write_text(json.dumps(note))
    wrong = ClipSet(noted)
    problems = []
    for i in range(len(wrong)):
        try:
            wrong[i]
        except RecordError as error:
            problems.append(str(error))
    assert sum("source.json says otherwise" in problem for problem in problems) == 2  # both that are left of clip c3
    del note["shards"]
    (noted / "source.json").write_text(json.dumps(note))
    with pytest.raises(RecordFileError, match="damaged"):
        ClipSet(noted)


def test_what_is_no_set_is_refused(folder, tmp_path):
    with pytest.raises(RecordFileError, match="no split 'dev' .it has bench, train"):
        open_source(f"{folder}@dev", "")
    with pytest.raises(RecordFileError, match="features.json is missing"):
        open_source(tmp_path, "")


def test_tfds_is_imported_only_when_a_set_is_opened():
    code = "import sys, mllm4d_jax.data.loader\nassert 'tensorflow_datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_set_in_a_bucket_is_the_same(front, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there, here = put_folder(folder, "sets/mllm4d/1.0.0"), open_source(folder, "")
    source = open_source(there, "")
    assert (source.digest, len(source), source.key(3)) == (here.digest, len(here), here.key(3))
    assert source.name == f"{there}@train"
    ours, theirs = (s[3].messages[0]["content"][0]["frames"].jpegs for s in (source, here))
    assert ours == theirs and source[3].messages[-1] == here[3].messages[-1]
    assert len(open_source(f"{there}@bench", "")) == 2
    with pytest.raises(RecordFileError, match="no such file of records"):
        open_source(f"{there}/none", "")
