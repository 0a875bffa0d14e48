"""Worker processes: the same batches as without them, and none that dies or hangs holds up the run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time

import cv2
import numpy as np
import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.loader import Loader, LoaderOptions
from mllm4d_jax.data.prefetch import Prefetcher
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Mixture, Questions
from mllm4d_jax.data.workers import WorkerError, WorkerPool
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import Example, VideoOptions
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import QWEN_SPECIAL_IDS, Tokenizer, build_byte_level_tokenizer
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.rows.shape import RowShape
from tests.data.fakes import DangerousEncoder, arrays, write_records

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
    return Loader(
        Mixture(sources),
        GroupEncoder(sources, encoder),
        LoaderOptions(batch_size=8, questions_per_video=4, workers=workers),
        RowShape(VisionGeometry(2, 8, 0), IDS[:2], 1536, (64, 128, 256), (32, 64)),
        Quarantine(tmp_path / f"q{workers}.jsonl", 1.0),
        seed=0,
    )


def test_workers_change_nothing(world, tmp_path):
    """Bit for bit, bad records and a bad clip among them, over more than two epochs, through the prefetching thread."""
    with real_loader(world, tmp_path, 0) as plain, real_loader(world, tmp_path, 2) as parallel:
        with plain.encoder.encoder, Prefetcher(parallel.next_batch) as ahead:
            for _ in range(6):
                want = plain.next_batch()
                while (got := ahead.poll(1.0)) is None:
                    pass
                fields = [f.name for f in dataclasses.fields(want) if f.name not in ("batch", "load_s")]
                assert [getattr(got, f) for f in fields] == [getattr(want, f) for f in fields]
                assert got.batch.inputs.layout == want.batch.inputs.layout
                for a, b in zip(arrays(got), arrays(want), strict=True):
                    np.testing.assert_array_equal(a, b)
                    assert a.dtype == b.dtype
        pids = parallel.stream._pool.pids()
        assert len(pids) == 2
    assert (tmp_path / "q0.jsonl").read_text() == (tmp_path / "q2.jsonl").read_text()
    assert len((tmp_path / "q0.jsonl").read_text().splitlines()) == 5
    assert not any(alive(pid) for pid in pids)
    assert not any(t.name.startswith("loader") for t in threading.enumerate())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def make_pool(tmp_path):
    def make(numbers, count=1, limit=30.0):
        source = RecordFile(write_records(tmp_path / "r.json", numbers), tmp_path)
        return WorkerPool(GroupEncoder([source], DangerousEncoder(tmp_path)), count, limit)

    return make


def ask(pool, *indices):
    return pool.submit(Questions(0, indices)).result(timeout=60)


def test_a_worker_that_dies_is_replaced_and_its_group_tried_once_more(make_pool):
    with make_pool([5, 16, 13, 6]) as pool:
        assert ask(pool, 0)[0].key == "r.json#0"
        retried = ask(pool, 0, 1)  # dies once
        assert [e.key for e in retried] == ["r.json#0", "r.json#1"] and all(isinstance(e, Example) for e in retried)
        refused = ask(pool, 2, 0)  # dies each time
        assert [(e.reason, e.key) for e in refused] == [("worker_crash", "r.json#2"), ("worker_crash", "r.json#0")]
        assert ask(pool, 3)[0].key == "r.json#3"
        for pid in pool.pids():  # killed between two requests: nobody notices
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        assert ask(pool, 0)[0].key == "r.json#0"
        assert len(pool.pids()) == 1


def test_a_worker_that_hangs_is_killed(make_pool):
    with make_pool([14, 5], limit=1.0) as pool:
        refused = ask(pool, 0)
        assert isinstance(refused[0], RecordError) and refused[0].reason == "timeout" and "1 s" in refused[0].message
        assert ask(pool, 1)[0].key == "r.json#1"


def test_a_bug_in_a_worker_stops_the_run_with_its_traceback(make_pool):
    with make_pool([15]) as pool, pytest.raises(WorkerError, match="ZeroDivisionError: a bug"):
        ask(pool, 0)


def test_closing_does_not_wait_for_work_in_progress(make_pool):
    pool = make_pool([14, 14, 14], count=2)
    for i in range(3):
        pool.submit(Questions(0, (i,)))
    while len(pool.pids()) < 2:
        time.sleep(0.05)
    started = time.perf_counter()
    pids = pool.pids()
    pool.close()
    assert time.perf_counter() - started < 5 and not any(alive(pid) for pid in pids)
