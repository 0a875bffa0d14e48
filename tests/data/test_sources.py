"""Sources of records: which records share media, mixtures, and the memory that a long list takes."""

from __future__ import annotations

import json
import pickle
import tracemalloc

import numpy as np
import pytest

from mllm4d_jax.data.json_index import RecordFileError, build_index
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Ingredient, Mixture, open_mixture, open_source, parse_mixture
from mllm4d_jax.run.preflight import place_problems
from tests.data.fakes import write_records


def turns(text="x"):
    return [{"from": "user", "value": text}]


RECORDS = [
    {"video": "a.mp4", "conversations": turns()},
    {"video": "b.mp4", "conversations": turns()},
    {"conversations": turns(), "video": "a.mp4", "image": None},
    {"video": ["a.mp4"], "conversations": turns()},
    {"image": "a.mp4", "conversations": turns()},
    {"conversations": turns()},
    {"conversations": turns()},
    {"videos": ["a.mp4", "b.mp4"], "conversations": turns()},
    {"videos": ["a.mp4", "b.mp4"], "conversations": turns("y")},
    {"video": "\u00e9\U0001f600.mp4", "conversations": turns()},
    {"video": "\u00e9\U0001f600.mp4", "conversations": turns()},
    "no object",
]
WANT = [0, 1, 0, 2, 3, 4, 5, 6, 6, 7, 7, 8]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("lines", [True, False])
def test_records_with_the_same_media_have_the_same_clip_number(tmp_path, lines, ascii_only):
    path = tmp_path / "r.json"
    dumps = [json.dumps(r, ensure_ascii=ascii_only) for r in RECORDS]
    path.write_text("\n".join(dumps) if lines else f"[{', '.join(dumps)}]", encoding="utf-8")
    for chunk in (64, 1 << 20):
        index = build_index(path, chunk)
        assert index.clips.tolist() == WANT and index.clips.dtype == np.int32


@pytest.mark.parametrize("lines", [True, False])
def test_broken_records_share_nothing(tmp_path, lines):
    path = tmp_path / "r.json"
    good = json.dumps(RECORDS[0])
    entries = [good, '{"video": "a.mp4", "conversations": [}', good, '{"video": "a.mp4" "x"}', good]
    path.write_text("\n".join(entries) if lines else f"[{', '.join(entries)}]")
    clips = RecordFile(path, tmp_path).clips
    assert len(set(clips)) == len(clips) - 2 and clips[0] == clips[2] == clips[4]


def test_a_long_list_takes_little_memory(tmp_path):
    """25,000 records of 300 bytes: the index holds 40 bytes each and the scan a few chunks, not the 8 MB file."""
    path = tmp_path / "r.json"
    text = "<video>\nHow far does it move?" * 8
    with path.open("w") as file:
        file.write("[")
        for i in range(25_000):
            record = {"video": f"v/{i * 7919 % 2000}.mp4", "conversations": [{"from": "user", "value": text}]}
            file.write((",\n" if i else "") + json.dumps(record))
        file.write("]")
    assert path.stat().st_size > 7 << 20
    tracemalloc.start()
    index = build_index(path, chunk=1 << 16)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 25_000 and len(set(index.clips)) == 2000
    assert kept < 40 * len(index) and peak < 160 * len(index)


def test_a_record_file_travels_to_another_process(tmp_path):
    source = RecordFile(write_records(tmp_path / "r.json", [("a.mp4", 5), ("b.mp4", 6)]), tmp_path, "Be brief.")
    other = pickle.loads(pickle.dumps(source))
    assert other[1] == source[1] and other.clips.tolist() == source.clips.tolist()
    assert (other.digest, other.name, other.key(1)) == (source.digest, source.name, source.key(1))


def test_mixture_entries():
    assert parse_mixture(["a.json::videos::0.7", "b/c@train::::2"]) == (
        Ingredient("a.json", "videos", 0.7),
        Ingredient("b/c@train", "", 2.0),
    )
    for entry in (
        "a.json",
        "a.json::v",
        "a::b::c",
        "::b::1",
        "a::b::0",
        "a::b::-1",
        "a::b::nan",
        "a::b::inf",
        "a::b::1::2",
    ):
        with pytest.raises(RecordFileError, match="path::root::rate") as caught:
            parse_mixture(["x::y::1", entry])
        assert f"'{entry}'" in str(caught.value)


def test_a_mixture_opens_its_sources_and_its_digest_follows_content_and_rates(tmp_path):
    a, b = (str(write_records(tmp_path / f"{n}.json", [5] * count)) for n, count in (("a", 2), ("b", 3)))
    alone = open_mixture(a, str(tmp_path), ())
    assert alone.digest == RecordFile(a, tmp_path).digest and alone.rates == (1.0,) and len(alone) == 2
    mixed = open_mixture("", "", [f"{a}::{tmp_path}::3", f"{b}::{tmp_path}::1"], "Be brief.")
    assert mixed.rates == (0.75, 0.25) and len(mixed) == 5 and mixed.system_prompt == "Be brief."
    assert mixed.sources[1][0].messages[0] == {"role": "system", "content": "Be brief."}
    others = [open_mixture("", "", [f"{a}::{tmp_path}::1", f"{b}::{tmp_path}::1"]), open_mixture(b, str(tmp_path), ())]
    assert len({m.digest for m in (alone, mixed, *others)}) == 4
    with pytest.raises(RecordFileError, match="no such file"):
        open_mixture("", "", [f"{a}::{tmp_path}::1", f"{tmp_path / 'absent'}::{tmp_path}::1"])


@pytest.mark.parametrize("name", ["sets@v2/train.json", "sets@v2", "sets@v2/more@v3"])
def test_a_record_file_may_have_an_at_sign_in_its_path(tmp_path, name):
    """Beside a folder with the name in front of it, too."""
    for folder in ("sets", "sets@v2/more"):
        if name != "sets@v2" or folder == "sets":
            (tmp_path / folder).mkdir(parents=True)
    path = write_records(tmp_path / name, [5, 6])
    assert len(open_source(path, tmp_path)) == 2
    with pytest.raises(RecordFileError, match="no TFDS set here"):
        open_source(f"{tmp_path / 'sets'}@test", tmp_path)
    (tmp_path / "sets" / "features.json").write_text("{}")  # as in a set: it alone needs no folder of media
    assert not list(place_problems("data.path =", f"{tmp_path / 'sets'}@test", ""))
    assert ["has no media folder" in problem for problem in place_problems("data.path =", str(path), "")] == [True]


def test_empty_sources_are_refused(tmp_path):
    empty = RecordFile(write_records(tmp_path / "e.json", []), tmp_path)
    with pytest.raises(RecordFileError, match="e.json holds no records"):
        Mixture([empty])
    with pytest.raises(RecordFileError, match="1 sources of records with 2 rates"):
        Mixture([empty], [1, 2])
