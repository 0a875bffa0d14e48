"""Records and clips in a bucket: the same examples as from a folder, through the loader's own way."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.data.reader import GroupReader
from mllm4d_jax.data.sources import Questions, open_mixture, open_source
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.files.remote import RemoteError
from mllm4d_jax.qa.errors import RecordError
from tests.buckets import BUCKET, put_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def encoder(tiny_world):
    folder, _ = tiny_world
    with Encoder(ProcessorConfig.from_folder(folder), Tokenizer.from_folder(folder), VideoOptions(4)) as encoder:
        yield encoder


def examples(records, root, encoder, workers: int = 0) -> list:
    source = open_source(records, root)
    groups = [Questions(0, (i,)) for i in range(len(source))]
    with GroupReader(groups, GroupEncoder([source], encoder, 0), workers=workers, ahead=2) as reader:
        return [result for group in reader for result in group.results.values()]


def same(a, b) -> bool:
    if isinstance(a, RecordError):
        return isinstance(b, RecordError) and (a.reason, a.key) == (b.reason, b.key)
    return a.key == b.key and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "positions", "patches", "supervised")
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_examples_are_those_of_a_folder(front, mixed_world, tiny_world, encoder, workers):
    _, path = mixed_world
    there = put_folder(path.parent, "worlds/mixed")
    front.rate, front.kinds = 0.05, ("503", "cut", "slow")
    got = examples(f"{there}/{path.name}", there, encoder, workers)
    front.rate = 0.0
    want = examples(path, path.parent, encoder)
    assert len(got) == len(want) and all(same(a, b) for a, b in zip(got, want, strict=True))
    (bad,) = [r for r in got if isinstance(r, RecordError) and r.reason == "missing_file"]
    assert f"{there}/videos/absent.mp4 does not exist" in bad.message
    front.reset()
    examples(f"{there}/{path.name}", there, encoder, workers)
    asked = [name for name in front.requests if ".mp4" in name and "absent" not in name]
    assert not asked, "clips that are here are asked for again"


def test_what_is_wrong_with_a_clip_names_its_path_in_the_bucket(front, tmp_path, encoder):
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "a.mp4").write_bytes(b"no video at all")
    turns = [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "B"}]
    (tmp_path / "world" / "r.json").write_text(json.dumps([{"video": "a.mp4", "conversations": turns}]))
    there = put_folder(tmp_path / "world", "worlds/broken")
    (bad,) = examples(f"{there}/r.json", there, encoder)
    assert bad.reason == "not_a_video" and f"{there}/a.mp4" in bad.message and "cache" not in bad.message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refusal_stops_the_run(front, tiny_world, encoder, workers):
    _, path = tiny_world
    there = put_folder(path.parent, "worlds/refused")
    front.refuse = lambda method, name: 403 if ".mp4" in name else None
    with pytest.raises(RemoteError, match=r"videos/clip_000.mp4: permission denied \(403\)"):
        examples(f"{there}/{path.name}", there, encoder, workers)


def test_lists_and_mixtures_are_the_same_data(front, tiny_world):
    _, path = tiny_world
    there = put_folder(path.parent, "worlds/same")
    entries = [(f"{root}/{path.name}::{root}::1", f"{root}/{path.name}::{root}::3") for root in (there, path.parent)]
    a, b = (open_mixture("", "", mixture) for mixture in entries)
    assert a.digest == b.digest and len(a) == len(b) and a.sources[0].key(3) == b.sources[0].key(3)
    assert a.name.startswith(f"{there}/")
    other = pickle.loads(pickle.dumps(a.sources[0]))
    assert other[1].messages[-1] == b.sources[0][1].messages[-1]
    with pytest.raises(RecordFileError, match=f"gs://{BUCKET}/none.json: no such file of records"):
        open_source(f"gs://{BUCKET}/none.json", there)
