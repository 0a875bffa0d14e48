"""Order, batches, quarantine and prefetching of the loader, with an encoder made of numbers."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from mllm4d_jax.data.loader import BatchLayout, ExampleCache, Loader, LoaderError, Prefetcher, bucket, make_batch
from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.data.records import RecordFile
from mllm4d_jax.processing.errors import RecordError
from mllm4d_jax.processing.example import Example, Grid
from mllm4d_jax.processing.grids import VisionGeometry

VIDEO, PATCH = 500, 24


def make_example(key: str, text: int, grid: Grid | None = None, supervised: slice = slice(2, 4)) -> Example:
    """`text` text tokens numbered from 100, after the placeholders of one visual item."""
    visual = grid.t * grid.h * grid.w // 4 if grid else 0
    tokens = np.concatenate([np.full(visual, VIDEO), 100 + np.arange(text)]).astype(np.int32)
    mask = np.zeros(len(tokens), bool)
    mask[visual:][supervised] = True
    return Example(
        key=key,
        tokens=tokens,
        positions=np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1)),
        rope_delta=0,
        supervised=mask,
        patches=np.ones((4 * visual, PATCH), np.float32),
        grids=(grid,) if grid else (),
        timestamps=(),
        text="",
    )


class FakeEncoder:
    """Encodes a record to as many tokens as its text says; negative numbers are bad records."""

    def __init__(self):
        self.calls = []

    def encode(self, record):
        self.calls.append(record.key)
        number = int(record.messages[0]["content"][0]["text"])
        if number < 0:
            raise RecordError("made to fail", "missing_file").with_key(record.key)
        return make_example(record.key, number)


class CrashOnce(FakeEncoder):
    def encode(self, record):
        if not self.calls:
            self.calls.append(record.key)
            raise RecordError("killed by a signal", "decoder_crash")
        return super().encode(record)


def layout(**changes):
    values = dict(
        batch_size=3,
        length_buckets=(8, 16),
        geometry=VisionGeometry(merge_size=2, position_side=4, window=0),
        visual_token_ids=(501, VIDEO),
    )
    return BatchLayout(**(values | changes))


@pytest.fixture
def make_loader(tmp_path):
    def make(numbers, *, position=0, seed=0, rate=0.5, rejected=0, fresh=False, encoder=None, cache=None):
        path = tmp_path / "r.json"
        path.write_text(json.dumps([{"conversations": [{"from": "user", "value": str(n)}]} for n in numbers]))
        quarantine = Quarantine(tmp_path / "quarantine.jsonl", rate, rejected=rejected, fresh=fresh)
        records = RecordFile(path, tmp_path)
        encoder = encoder or FakeEncoder()
        return Loader(records, encoder, layout(), quarantine, seed=seed, position=position, cache=cache)

    return make


def keys(loader, batches):
    return [loader.next_batch().keys for _ in range(batches)]


def test_order_is_a_new_permutation_each_epoch_and_depends_on_the_seed(make_loader):
    loader = make_loader([5] * 12)
    seen = sum(keys(loader, 8), ())
    first, second = seen[:12], seen[12:]
    assert len(set(first)) == len(set(second)) == 12 and first != second
    others = [sum(keys(make_loader([5] * 12, seed=s), 8), ()) for s in (0, 1, 2)]
    assert others[0] == seen
    # With seed + epoch as Grain has it, one seed's second epoch would be the next seed's first.
    assert len({*[o[:12] for o in others], *[o[12:] for o in others]}) == 6


def test_any_position_can_be_the_start(make_loader):
    straight = make_loader([5, 6, -1, 7, 8, -1, 6])
    batches = [straight.next_batch() for _ in range(9)]
    for start in (0, 3, 6):
        before = batches[start]
        resumed = make_loader([5, 6, -1, 7, 8, -1, 6], position=before.position, rejected=before.rejected)
        for want in batches[start + 1 :]:
            got = resumed.next_batch()
            assert (got.keys, got.position, got.rejected) == (want.keys, want.position, want.rejected)
            np.testing.assert_array_equal(got.batch.inputs.tokens, want.batch.inputs.tokens)


def test_supervision_points_at_the_token_before_each_target():
    examples = [
        make_example("a", 6),
        make_example("b", 9, Grid("video", 1, 2, 2)),
        make_example("c", 5, None, slice(0, 2)),
    ]
    batch = make_batch(examples, layout())
    tokens = batch.inputs.tokens
    assert tokens.shape == (3, 16)
    real = batch.loss_weight > 0
    rows, columns = np.divmod(batch.loss_index[real], 16)
    np.testing.assert_array_equal(tokens[rows, columns + 1], batch.loss_target[real])
    # Row c supervises its first token, which nothing predicts.
    assert list(zip(rows, columns, strict=True)) == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 0)]
    assert len(batch.loss_weight) == 16 and batch.loss_weight.sum() == 5
    assert batch.loss_index.dtype == batch.loss_target.dtype == np.int32


def test_shapes_come_from_few_buckets():
    grids = [Grid("video", t, h, h) for t in range(1, 9) for h in (2, 4, 6)]
    shapes = set()
    for grid in grids:
        vision = make_batch([make_example("a", 5, grid)], layout(length_buckets=(8, 128), shards=4)).inputs.vision
        assert vision.patches.shape[0] % 4 == 0
        shapes.add(vision.patches.shape)
    assert len(shapes) == 2 * 3
    with pytest.raises(LoaderError, match="big has 17 tokens"):
        make_batch([make_example("small", 5), make_example("big", 17)], layout())


def test_bucket_sizes():
    assert [bucket(n, 2) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert sorted({bucket(n, 4) for n in range(8, 65)}) == [8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    for n in range(1, 3000):
        assert n <= bucket(n, 2) <= 1.5 * n and n <= bucket(n, 4) <= 1.25 * n


def test_text_only_batch_has_no_vision():
    assert make_batch([make_example("a", 5)], layout()).inputs.vision is None


def test_bad_records_are_written_down_once_and_skipped(make_loader, tmp_path):
    loader = make_loader([5, -1, 6, 7, -2, 5, 5, 5])
    batches = [loader.next_batch() for _ in range(8)]
    assert len(set(sum((b.keys for b in batches), ())) & {"r.json#1", "r.json#4"}) == 0
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == [1, 4]
    assert lines[0].keys() == {"index", "key", "reason", "message"} and lines[0]["reason"] == "missing_file"
    assert {line["key"] for line in lines} == {"r.json#1", "r.json#4"}
    assert loader.encoder.calls.count("r.json#1") == 1  # never tried again
    assert batches[-1].position == 24 + batches[-1].rejected
    # A later part of the run neither tries them again nor writes them again.
    resumed = make_loader([5, -1, 6, 7, -2, 5, 5, 5], position=batches[-1].position)
    keys(resumed, 8)
    assert not {"r.json#1", "r.json#4"} & set(resumed.encoder.calls)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2


def test_a_fresh_run_forgets_the_quarantine(make_loader, tmp_path):
    keys(make_loader([5, -1, 6, 7]), 4)
    assert "r.json#1" in (tmp_path / "quarantine.jsonl").read_text()
    loader = make_loader([5, 5, 6, 7], fresh=True)
    assert "r.json#1" in sum(keys(loader, 4), ()) and not (tmp_path / "quarantine.jsonl").exists()


def test_a_half_written_quarantine_line_is_dropped(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"index": 3, "key": "k", "reason": "r", "message": "m"}\n{"index": 4, "ke')
    quarantine = Quarantine(path, 0.5)
    assert 3 in quarantine and 4 not in quarantine
    for _ in range(2):
        quarantine.add(4, RecordError("m", "r", "k4"))
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [3, 4]


def test_a_record_without_an_answer_is_quarantined(make_loader, tmp_path):
    keys(make_loader([5, 2, 6, 7]), 4)  # two tokens: nothing is supervised
    assert '"no_target"' in (tmp_path / "quarantine.jsonl").read_text()


def test_a_decoder_killed_from_outside_does_not_cost_a_record(make_loader, tmp_path):
    loader = make_loader([5] * 4, encoder=CrashOnce())
    loader.next_batch()
    assert loader.encoder.calls[0] == loader.encoder.calls[1] and not (tmp_path / "quarantine.jsonl").exists()


def test_too_many_bad_records_stop_the_run(make_loader, tmp_path):
    with pytest.raises(QuarantineError, match="max_quarantine_rate = 0.01") as caught:
        keys(make_loader([-1] * 50 + [5] * 50, rate=0.01), 40)
    assert str(tmp_path / "quarantine.jsonl") in str(caught.value)
    with pytest.raises(QuarantineError, match="not one usable record"):
        make_loader([-1] * 4, rate=1.0, fresh=True).next_batch()


def test_the_ceiling_bears_with_chance_but_not_with_more():
    """Shares of half the limit pass, twice the limit is stopped."""

    def run(share, steps=20_000):
        rng = np.random.default_rng(0)
        quarantine = Quarantine("/nonexistent/q", 0.01)
        for seen in range(1, steps + 1):
            if rng.uniform() < share:
                quarantine.count(seen)

    run(0.005)
    with pytest.raises(QuarantineError):
        run(0.02)
    early = Quarantine("/nonexistent/q", 0.0)
    for seen in range(1, 20):
        early.count(seen)
    with pytest.raises(QuarantineError, match="20 of the first 20"):
        early.count(20)


def test_a_bug_is_not_quarantined(make_loader):
    class Broken:
        def encode(self, record):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_loader([5], encoder=Broken()).next_batch()


def test_cache_is_bounded_and_drops_the_oldest():
    size = sum(a.nbytes for a in (lambda e: (e.tokens, e.positions, e.supervised, e.patches))(make_example("k", 6)))
    cache = ExampleCache(max_bytes=2 * size)
    a, b, c = (make_example(k, 6) for k in "abc")
    cache.put(0, a)
    cache.put(1, b)
    assert cache.get(0) is a
    cache.put(2, c)
    assert cache.get(1) is None and cache.get(0) is a and cache.get(2) is c
    assert cache.bytes == 2 * size
    cache.put(3, make_example("big", 600))
    assert cache.get(3) is None and cache.bytes == 2 * size


def test_cached_examples_are_not_encoded_again(make_loader):
    loader = make_loader([5] * 6)
    keys(loader, 6)
    assert len(loader.encoder.calls) == 6
    without = make_loader([5] * 6, cache=ExampleCache(0))
    assert keys(without, 6) == keys(make_loader([5] * 6), 6)
    assert len(without.encoder.calls) == 18


def drain(prefetcher, count):
    got = []
    while len(got) < count:
        if (item := prefetcher.poll(0.2)) is not None:
            got.append(item)
    return got


def test_prefetching_changes_nothing_and_its_thread_ends(make_loader):
    want = keys(make_loader([5, -1, 6, 7, 8]), 5)
    with Prefetcher(make_loader([5, -1, 6, 7, 8])) as batches:
        assert [b.keys for b in drain(batches, 5)] == want
    assert not any(t.name == "loader" for t in threading.enumerate())


def test_prefetching_hands_errors_on(make_loader):
    with Prefetcher(make_loader([-1] * 40, rate=0.01)) as batches, pytest.raises(QuarantineError):
        drain(batches, 1)


def test_leaving_early_does_not_wait_for_a_whole_batch(make_loader):
    class Slow(FakeEncoder):
        def encode(self, record):
            time.sleep(0.2)
            return super().encode(record)

    with Prefetcher(make_loader([5] * 50, encoder=Slow())):
        time.sleep(0.1)
        started = time.perf_counter()
    assert time.perf_counter() - started < 0.5  # one record, not three


def test_no_records_and_bad_buckets(make_loader):
    with pytest.raises(LoaderError, match="holds no records"):
        make_loader([])
    with pytest.raises(LoaderError, match="ascending"):
        layout(length_buckets=(16, 8))
