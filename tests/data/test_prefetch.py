"""The thread that makes the next batch."""

from __future__ import annotations

import threading
import time

import pytest

from mllm4d_jax.data.prefetch import Prefetcher
from mllm4d_jax.data.quarantine import QuarantineError
from tests.data.fakes import FakeEncoder


def drain(prefetcher, count):
    got = []
    while len(got) < count:
        if (item := prefetcher.poll(0.2)) is not None:
            got.append(item)
    return got


def test_prefetching_changes_nothing_and_its_thread_ends(make_loader):
    straight = make_loader([5, -1, 6, 7, 8])
    want = [straight.next_batch().keys for _ in range(5)]
    with Prefetcher(make_loader([5, -1, 6, 7, 8], fresh=True).next_batch) as batches:
        assert [b.keys for b in drain(batches, 5)] == want
    assert not any(t.name == "loader" for t in threading.enumerate())


def test_prefetching_hands_errors_on(make_loader):
    with Prefetcher(make_loader([-1] * 40, rate=0.01).next_batch) as batches, pytest.raises(QuarantineError):
        drain(batches, 20)


def test_leaving_early_does_not_wait_for_a_whole_batch(make_loader):
    class Slow(FakeEncoder):
        def encode_group(self, records, cache=None):
            time.sleep(0.2)
            return super().encode_group(records)

    with Prefetcher(make_loader([5] * 50, encoder=Slow()).next_batch):
        time.sleep(0.1)
        started = time.perf_counter()
    assert time.perf_counter() - started < 0.5  # one group, not three
