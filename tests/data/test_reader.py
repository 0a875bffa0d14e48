"""Groups encoded ahead: the same with worker processes as without, and none that dies or hangs holds up the run."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.loader import Loader
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.reader import GroupReader, WorkerError
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Mixture, Questions
from mllm4d_jax.data.stream import GroupStream, LoaderOptions
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import Example, VideoOptions
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import QWEN_SPECIAL_IDS, Tokenizer, build_byte_level_tokenizer
from mllm4d_jax.rows.shape import RowShape
from tests.data.fakes import DangerousEncoder, FakeEncoder, arrays, next_batch, write_records

IDS = (151655, 151656, 151652, 151653)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five clips of different sizes with four questions each; one clip is missing, one question has a bad role."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for n, (height, width) in enumerate([(48, 64), (64, 48), (96, 96), (32, 128)]):
        writer = cv2.VideoWriter(str(folder / f"c{n}.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8.0, (width, height))
        for _ in range(6 + n):
            writer.write(rng.integers(0, 255, (height, width, 3)).astype(np.uint8))
        writer.release()
    records = []
    for n in range(5):
        for i in range(4):
            turns = [{"from": "human", "value": f"<video>What moves {'so ' * i}?"}, {"from": "gpt", "value": "ABCD"[i]}]
            records.append({"video": f"c{n}.mp4", "conversations": turns})
    records[6]["conversations"][0]["from"] = "judge"
    (folder / "r.json").write_text(json.dumps(records))
    return folder


def real_loader(world, tmp_path, workers):
    half = (0.5, 0.5, 0.5)
    config = ProcessorConfig("qwen3_vl", 16, 2, 2, half, half, 65536, 16777216, 4096, 25165824, 0.0, *IDS)
    words = ["user assistant <0.3 seconds> What moves so?"] * 3
    encoder = Encoder(config, Tokenizer(build_byte_level_tokenizer(words, 400, QWEN_SPECIAL_IDS)), VideoOptions(8))
    sources = [RecordFile(world / "r.json", world)]
    options = LoaderOptions(batch_size=8, questions_per_video=4, workers=workers)
    quarantine = Quarantine(tmp_path / f"q{workers}.jsonl", 1.0)
    stream = GroupStream(Mixture(sources), GroupEncoder(sources, encoder), quarantine, options)
    return Loader(stream, RowShape(VisionGeometry(2, 8, 0), IDS[:2], 1536, (64, 128, 256), (32, 64)))


def test_workers_change_nothing(world, tmp_path):
    """Bit for bit, bad records and a bad clip among them, over more than two epochs."""
    plain, parallel = real_loader(world, tmp_path, 0), real_loader(world, tmp_path, 2)
    with plain.stream, parallel.stream, plain.stream.encoder.encoder:
        for _ in range(6):
            want, got = next_batch(plain), next_batch(parallel)
            fields = [f.name for f in dataclasses.fields(want) if f.name not in ("batch", "load_s")]
            assert [getattr(got, f) for f in fields] == [getattr(want, f) for f in fields]
            assert got.batch.inputs.layout == want.batch.inputs.layout
            for a, b in zip(arrays(got), arrays(want), strict=True):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype
        assert len(multiprocessing.active_children()) == 2
    assert (tmp_path / "q0.jsonl").read_text() == (tmp_path / "q2.jsonl").read_text()
    assert len((tmp_path / "q0.jsonl").read_text().splitlines()) == 5
    assert not multiprocessing.active_children()
    assert not any(t.name.startswith("loader") for t in threading.enumerate())


class SlowEncoder(FakeEncoder):
    def __init__(self, seconds=0.5):
        super().__init__()
        self.seconds, self.begun, self.done = seconds, 0, 0

    def encode_group(self, records, cache=None):
        self.begun += 1
        time.sleep(self.seconds)
        self.done += 1
        return super().encode_group(records)


@pytest.fixture
def make_reader(tmp_path):
    """A reader of groups of records of one clip each, given as their tokens: numbers, or tuples of them."""

    def make(*groups, workers=1, encoder=None, ahead=2, **options):
        groups = [group if isinstance(group, tuple) else (group,) for group in groups]
        entries = [(f"{n}.mp4", number) for n, group in enumerate(groups) for number in group]
        source = RecordFile(write_records(tmp_path / "r.json", entries), tmp_path)
        ends = np.cumsum([len(group) for group in groups]).tolist()
        asked = [Questions(0, tuple(range(end - len(group), end))) for end, group in zip(ends, groups, strict=True)]
        group_encoder = GroupEncoder([source], encoder or DangerousEncoder(tmp_path))
        return GroupReader(asked, group_encoder, workers=workers, ahead=ahead, **options)

    return make


def said(group):
    """The key of each example and the reason of each error."""
    return {i: r.key if isinstance(r, Example) else r.reason for i, r in group.results.items()}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_worker_that_dies_is_replaced_and_its_group_tried_once_more(make_reader, tmp_path, workers):
    """16 dies once, 13 each time; groups that other workers had ready before the death arrive in their places."""
    with make_reader(5, (6, 16), (13, 7), 8, 9, workers=workers) as reader:
        found = [said(group) for group in reader]
    assert found[:2] == [{0: "r.json#0"}, {1: "r.json#1", 2: "r.json#2"}]
    assert found[2:] == [{3: "worker_crash", 4: "worker_crash"}, {5: "r.json#5"}, {6: "r.json#6"}]
    assert (tmp_path / "deaths").read_text().split().count("13") == 2


# Four times are more than may happen without a group in between.
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_killed_between_two_groups_are_nobodys_fault(make_reader, times):
    with make_reader(*[5] * 12, ahead=1) as reader:
        found = [said(reader.take())]
        for _ in range(times):
            time.sleep(0.3)  # the worker waits for room
            for child in multiprocessing.active_children():
                child.kill()
            found += [said(reader.take()) for _ in range(2)]
        found += [said(group) for group in reader]
    assert found == [{i: f"r.json#{i}"} for i in range(12)]


class DiesAtStart(FakeEncoder):
    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.slow
def test_workers_that_never_live_stop_the_run(make_reader):
    with make_reader(5, (6, 7), encoder=DiesAtStart(), start=1) as reader:
        with pytest.raises(WorkerError, match="died 3 times before the group of r.json#1, r.json#2 was there"):
            reader.take()


def test_a_worker_that_hangs_is_killed(make_reader):
    with make_reader(14, 5) as reader:
        assert reader.limit_s == 64
        reader.limit_s = 1.0
        refused, fine = reader.take(), reader.take()
    assert said(refused) == {0: "timeout"} and "1 s" in refused.results[0].message
    assert said(fine) == {1: "r.json#1"}


class ReadsSlowly(DangerousEncoder):
    """Waits for its file before it does anything else."""

    seconds = 2.5

    def encode_group(self, records, cache=None):
        with self.unwatched():
            time.sleep(self.seconds)
        return super().encode_group(records)


def test_nobody_is_blamed_for_a_slow_bucket_but_still_for_what_comes_after(make_reader, tmp_path):
    with make_reader(5, 14, 6, encoder=ReadsSlowly(tmp_path)) as reader:
        reader.limit_s = 1.0
        assert [said(group) for group in reader] == [{0: "r.json#0"}, {1: "timeout"}, {2: "r.json#2"}]


class NeverReads(ReadsSlowly):
    seconds = 600


def test_closing_does_not_wait_for_a_bucket(make_reader, tmp_path):
    reader = make_reader(5, encoder=NeverReads(tmp_path))
    reader.start()
    while not reader._roster._rows[0, 1]:
        time.sleep(0.05)
    time.sleep(0.2)  # it waits by now
    started = time.perf_counter()
    reader.close()
    assert time.perf_counter() - started < 5 and not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_stops_the_run_with_its_traceback(make_reader, workers):
    with make_reader(5, 15, workers=workers) as reader:
        reader.take()
        with pytest.raises(ZeroDivisionError, match="a bug") as caught:
            reader.take()
    assert any(entry.name == "_encode" for entry in caught.traceback)


class OneClip(FakeEncoder):
    """All examples of a group hold the same patches, as those of the real encoder do."""

    def encode_group(self, records, cache=None):
        examples = super().encode_group(records)
        return [dataclasses.replace(e, patches=examples[0].patches) for e in examples]


def test_patches_cross_in_shared_memory_and_stay_one_array(make_reader):
    with make_reader((5, 6), 9, (7, 8), encoder=OneClip()) as reader:
        patches = [e.patches for e in reader.take().examples]
        reader._next.result()
        group, passed = next(reader._iterator)
        assert [type(array).__name__ for array in passed] == ["SharedMemoryArray"]
        assert group.examples[0].patches.ndim == 0  # its number
        passed.clear()
    assert patches[0] is patches[1] and type(patches[0]) is np.ndarray and not patches[0].flags.writeable


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_is_heard_at_once_and_nothing_is_lost(make_reader, workers):
    with make_reader(5, 6, workers=workers, encoder=SlowEncoder(2.0)) as reader:
        asked = threading.Event()

        class Stop:
            def __bool__(self):
                return asked.is_set()

        reader.start()
        threading.Timer(0.1, asked.set).start()
        assert reader.take(Stop()) is None and not reader._next.done()  # the first group is still on its way
        assert [said(group) for group in reader] == [{0: "r.json#0"}, {1: "r.json#1"}]


@pytest.mark.parametrize("workers", [0, 1])
def test_known_records_are_not_tried_and_any_place_can_be_the_first(make_reader, workers):
    known = {(0, 1), (0, 2)}.__contains__
    options = {"known": lambda source, i: known((source, i)), "start": 1, "workers": workers, "encoder": FakeEncoder()}
    with make_reader(5, (6, 7, 8), 9, **options) as reader:
        assert [said(group) for group in reader] == [{3: "r.json#3"}, {4: "r.json#4"}]
        assert list(reader) == []


def test_closing_does_not_wait_for_work_in_progress(make_reader):
    reader = make_reader(14, 14, 14, workers=2)
    reader.start()
    while not all(reader._roster._rows[:, 1]):  # both are at work
        time.sleep(0.05)
    started = time.perf_counter()
    reader.close()
    assert time.perf_counter() - started < 5 and not multiprocessing.active_children()


def test_leaving_early_waits_for_the_group_under_way_only(make_reader):
    encoder = SlowEncoder()
    with make_reader(*[5] * 20, workers=0, encoder=encoder, ahead=10) as reader:
        reader.take()
        while encoder.begun == 1:  # the next one is under way
            time.sleep(0.01)
    done = encoder.done
    assert done == encoder.begun < 10  # of the ten groups ahead
    time.sleep(0.7)
    assert (encoder.begun, encoder.done) == (done, done)  # nobody goes on with an encoder that may be closed now


def test_an_interrupt_is_for_the_main_process(make_reader):
    with make_reader(*[5] * 8, ahead=1) as reader:
        reader.take()
        before = {child.pid for child in multiprocessing.active_children()}
        for pid in before:
            os.kill(pid, signal.SIGINT)
        assert before and all(said(reader.take()) for _ in range(5))
        assert {child.pid for child in multiprocessing.active_children()} == before
        assert len(list(reader)) == 2


SCRIPT = """
import sys
from absl import flags
from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.reader import GroupReader
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Questions
from tests.data.fakes import FakeEncoder

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    source = RecordFile(sys.argv[1], sys.argv[2])
    groups = [Questions(0, (i,)) for i in range(20)]
    reader = GroupReader(groups, GroupEncoder([source], FakeEncoder()), workers=2, ahead=8)
    with reader:
        kept = [reader.take() for _ in range(int(sys.argv[3]))]
    print(len(kept))
"""


@pytest.mark.parametrize("taken", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_nothing_is_left_behind_at_the_end(tmp_path, taken):
    """No exception that Python ignores, no shared memory: it says both on stderr when the interpreter ends."""
    records = write_records(tmp_path / "r.json", [("a.mp4", 5)] * 20)
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(tmp_path / "script.py"), str(records), str(tmp_path), str(taken)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{taken}\n", "")
