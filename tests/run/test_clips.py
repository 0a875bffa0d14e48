"""A run notices that its clips are other files than before, and nothing else."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.files.cache import ClipCache
from mllm4d_jax.run import clips
from mllm4d_jax.run.clips import CLIPS, ClipsError, check_clips
from tests.buckets import put_folder


def world(folder, number=3):
    """Two questions about each clip, one record that cannot be used, one without a clip that is there."""
    (folder / "media").mkdir()
    turns = [{"from": "human", "value": "<video>what"}, {"from": "gpt", "value": "B"}]
    records = [{"video": f"{n}.mp4", "conversations": turns} for n in range(number) for _ in range(2)]
    records += [{"video": "0.mp4", "conversations": [{"from": "judge", "value": "x"}]}]
    records += [{"video": "absent.mp4", "conversations": turns}]
    for n in range(number):
        (folder / "media" / f"{n}.mp4").write_bytes(bytes([n]) * 1000)
    (folder / "records.json").write_text(json.dumps(records))
    return source(folder)


def source(folder):
    return RecordFile(folder / "records.json", folder / "media")


@pytest.fixture
def begun(tmp_path):
    check_clips(tmp_path, [world(tmp_path)], fresh=True)
    return tmp_path


def test_the_same_clips_may_be_moved_and_touched(begun):
    before = (begun / CLIPS).read_text()
    shutil.move(begun / "media", begun / "elsewhere")
    for path in (begun / "elsewhere").iterdir():
        os.utime(path, (1, 1))
    check_clips(begun, [RecordFile(begun / "records.json", begun / "elsewhere")], fresh=False)
    assert (begun / CLIPS).read_text() == before and len(json.loads(before)) == 3


@pytest.mark.parametrize("content", [b"\1" * 999, b"\1" * 500 + b"\2" + b"\1" * 499])
def test_another_content_is_named(begun, content):
    (begun / "media" / "1.mp4").write_bytes(content)
    with pytest.raises(ClipsError, match=r"1 of the 3 clips .* began with: 1.mp4 \(record 2 of source 0\)"):
        check_clips(begun, [source(begun)], fresh=False)
    check_clips(begun, [source(begun)], fresh=True)  # another run may begin with it


def test_a_clip_that_goes_or_comes_is_no_other_clip(begun):
    (begun / "media" / "1.mp4").unlink()
    check_clips(begun, [source(begun)], fresh=False)
    (begun / "media" / "absent.mp4").write_bytes(b"found")
    check_clips(begun, [source(begun)], fresh=False)
    (begun / "media" / "absent.mp4").write_bytes(b"other")
    (begun / "media" / "1.mp4").write_bytes(b"other")  # it was known before it was gone
    with pytest.raises(ClipsError, match=r"2 of the 4 clips .*: 1.mp4 \(record 2 of source 0\), absent.mp4 \(record 7"):
        check_clips(begun, [source(begun)], fresh=False)


@pytest.mark.parametrize("text", [None, "", "{", "null", "[1]", "\ud83d"])
def test_without_what_the_clips_were_it_goes_on(begun, text, caplog):
    (begun / CLIPS).unlink() if text is None else (begun / CLIPS).write_text(text, errors="replace")
    check_clips(begun, [source(begun)], fresh=False)
    assert ("is not known" in caplog.text) == (text is not None)
    assert len(json.loads((begun / CLIPS).read_text())) == 3


def test_of_many_clips_some_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "_CLIPS", 4)
    check_clips(tmp_path, [world(tmp_path, number=50)], fresh=True)
    numbers = sorted(int(name.split(".")[0]) for name in json.loads((tmp_path / CLIPS).read_text()))
    assert len(numbers) == 3 and numbers[0] == 0 and max(np.diff(numbers)) < 20  # the absent one was the fourth


def test_a_clip_in_a_bucket_that_is_here_costs_no_request(front, tmp_path, monkeypatch):
    """What a run trains on is the copy, so that is what is compared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "world").mkdir()
    world(tmp_path / "world")
    there, here = put_folder(tmp_path / "world", "clips"), tmp_path / "run"
    here.mkdir()
    held = ClipCache()
    with held.held(f"{there}/media/0.mp4"), held.held(f"{there}/media/1.mp4"):
        pass
    records = RecordFile(f"{there}/records.json", f"{there}/media")
    front.reset()
    check_clips(here, [records], fresh=True)
    assert {name.rpartition("/")[2] for name in front.requests} == {"2.mp4", "absent.mp4"}
    check_clips(here, [source(tmp_path / "world")], fresh=False)  # the same clips, on the disk
    (tmp_path / "world" / "media" / "1.mp4").write_bytes(b"another")
    with pytest.raises(ClipsError, match=r"1\.mp4"):
        check_clips(here, [source(tmp_path / "world")], fresh=False)
