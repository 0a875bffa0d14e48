"""Steps of the loader: order, resume, hosts, rows and what happens to bad records, with an encoder made of numbers."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder, LeastRecentMedia
from mllm4d_jax.data.quarantine import QuarantineError
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Questions
from mllm4d_jax.data.steps import Counts
from mllm4d_jax.data.stream import LoaderError, LoaderOptions
from mllm4d_jax.encode.encoder import Media
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.rows.rows import RowSizes
from tests.data.fakes import PATCH, SHAPE, FakeEncoder, arrays, next_batch, write_records

# Seven clips with 1 to 7 questions of different lengths, every ninth of them bad.
CLIPS = [(f"c{n}.mp4", -1 if (n + i) % 9 == 0 else 4 + (3 * n + i) % 5) for n in range(1, 8) for i in range(n)]


def keys(loader, batches):
    return [next_batch(loader).keys for _ in range(batches)]


def common_sizes(steps):
    """Return the sizes that hosts agree on when each tells what its own step needs."""
    return SHAPE.sizes(RowSizes(*np.max([dataclasses.astuple(s.needed) for s in steps], axis=0).tolist()))


def assert_same(a, b):
    fields = [f.name for f in dataclasses.fields(a) if f.name not in ("batch", "load_s")]
    assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]
    assert a.batch.inputs.layout == b.batch.inputs.layout
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_an_epoch_uses_every_good_record_once(make_loader):
    loader = make_loader(CLIPS, batch_size=6, questions_per_video=3)
    groups = loader.stream.order.sources[0].groups
    seen = sum(keys(loader, 2 * groups // 2), ())  # two groups a step: two epochs
    good = sorted(f"r.json#{i}" for i, (_, n) in enumerate(CLIPS) if n > 0)
    assert sorted(seen) == sorted(2 * good) and loader.stream.position == 2 * groups


@pytest.mark.parametrize("options", [{}, {"questions_per_video": 3, "batch_size": 6, "rows": 1}])
def test_any_position_can_be_the_start(make_loader, options):
    straight = make_loader(CLIPS, **options)
    batches = [next_batch(straight) for _ in range(14)]
    for start in (0, 5, 11):
        before = batches[start]
        resumed = make_loader(CLIPS, position=before.position, rejected=before.counts.rejected, **options)
        for want in batches[start + 1 :]:
            assert_same(next_batch(resumed), want)
    with pytest.raises(LoaderError, match="inside a step"):
        make_loader(CLIPS, position=1, **options)


def test_bad_records_move_no_other(make_loader):
    """The same order with all records good: what is left is what was there, in the same steps."""
    options = {"questions_per_video": 3, "batch_size": 6}
    bad = [set(k) for k in keys(make_loader(CLIPS, **options), 10)]
    good = [set(k) for k in keys(make_loader([(c, abs(n) + 3) for c, n in CLIPS], fresh=True, **options), 10)]
    lost = {f"r.json#{i}" for i, (_, n) in enumerate(CLIPS) if n < 0}
    assert bad == [k - lost for k in good] and bad != good


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_take_what_one_takes(make_loader, hosts):
    options = {"questions_per_video": 2, "batch_size": 16, "rows": 4, "fresh": True}
    one = make_loader(CLIPS, **options)
    parts = [make_loader(CLIPS, host=h, hosts=hosts, **options) for h in range(hosts)]
    for _ in range(6):
        whole, steps = one.next_step(), [p.next_step() for p in parts]
        sizes = common_sizes(steps)
        batches = [s.finish(sizes) for s in steps]
        assert sorted(k for b in batches for k in b.keys) == sorted(
            e.key for row in whole.rows for g in row for e in g.examples
        )
        assert {b.position for b in batches} == {whole.position}
        assert len({tuple((x.shape, x.dtype) for x in arrays(b)) for b in batches}) == 1
        check_indices(batches)


def check_indices(batches):
    """Concatenated over hosts, each row's loss and vision indices point at the right things of that row."""
    parts = [b.batch for b in batches]
    tokens, vision = (np.concatenate([getattr(p.inputs, name) for p in parts]) for name in ("tokens", "vision_index"))
    lists = [np.concatenate([getattr(p, name) for p in parts]) for name in ("loss_index", "loss_target", "loss_weight")]
    real = np.concatenate([p.inputs.vision.frame_segments for p in parts]).reshape(len(tokens), -1, 4)
    layout = parts[0].inputs.layout
    assert sum(b.counts.supervised for b in batches) == lists[2].sum() > 0
    for row, row_vision, row_real, *row_lists in zip(tokens, vision, real, *lists, strict=True):
        for index, target in zip(*(x[row_lists[2] > 0] for x in row_lists[:2]), strict=True):
            if index >= layout.prefix:
                assert row[index + 1] == target
            else:  # the last prefix position of a clip predicts the first token of one of its branches
                assert target in row[layout.prefix :: layout.length]
        assert sorted(row_vision[row_vision >= 0]) == np.flatnonzero(row_real[:, 0]).tolist()


def test_a_host_without_clips_still_has_the_arrays_of_the_others(make_loader):
    records = [("c.mp4", 5), 5, 6, 7]
    parts = [make_loader(records, host=h, hosts=2, batch_size=2, fresh=True) for h in range(2)]
    for _ in range(2):
        steps = [p.next_step() for p in parts]
        sizes = common_sizes(steps)
        if sizes.frames:
            break
    shapes = [[x.shape for x in arrays(s.finish(sizes))] for s in steps]
    assert shapes[0] == shapes[1] and {bool(s.needed.frames) for s in steps} == {True, False}
    assert steps[0].finish(sizes).batch.inputs.vision.patches.shape[2] == PATCH


def test_counts_of_a_batch(make_loader):
    loader = make_loader([("a.mp4", 5), ("a.mp4", 6)], batch_size=2, questions_per_video=2)
    b = next_batch(loader)
    # Two placeholders and two more tokens are shared (the first target comes after them), then 3 and 4 of their own.
    slots = b.batch.inputs.tokens.size
    assert b.counts == Counts(examples=2, clips=1, tokens=4 + 3 + 4, slots=slots, visual=2, supervised=4)
    assert len(b.keys) == 2 and len(b.batch.loss_index) == 1 and b.load_s > 0
    assert b.batch.inputs.vision.patches.shape[0] == 2  # the clip's two frames, once


def test_a_step_without_a_usable_record_is_empty(make_loader):
    loader = make_loader([5, -1], batch_size=1)
    batches = [next_batch(loader) for _ in range(4)]
    assert sorted(len(b.keys) for b in batches) == [0, 0, 1, 1] and [b.position for b in batches] == [1, 2, 3, 4]
    empty = next(b for b in batches if not b.keys)
    assert (empty.counts.tokens, empty.counts.supervised, empty.counts.clips) == (0, 0, 0)
    assert not empty.batch.loss_weight.any() and not empty.batch.inputs.segment_ids.any()


def test_shapes_are_few_over_a_mixed_dataset(make_loader):
    rng = np.random.default_rng(0)
    clips = [(f"c{n}.mp4", int(rng.integers(4, 14))) for n in range(60) for _ in range(rng.integers(1, 9))]
    loader = make_loader(clips, batch_size=16, questions_per_video=4)
    batches = [next_batch(loader) for _ in range(100)]
    shapes = {(b.batch.inputs.layout, tuple(x.shape for x in arrays(b))) for b in batches}
    assert len(shapes) <= 12
    assert len({len(b.batch.loss_index) for b in batches}) == 1


def test_bad_records_are_written_down_once_and_skipped(make_loader, tmp_path):
    numbers = [5, -1, 6, 7, -2, 5, 5, 5]
    loader = make_loader(numbers)
    batches = [next_batch(loader) for _ in range(8)]
    assert not set(sum((b.keys for b in batches), ())) & {"r.json#1", "r.json#4"}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == [1, 4]
    assert lines[0].keys() == {"source", "index", "key", "reason", "message"} and lines[0]["reason"] == "missing_file"
    calls = loader.stream.encoder.encoder.calls
    assert calls.count("r.json#1") == 1  # never tried again
    assert batches[-1].position == 24 and batches[-1].counts.rejected == 6
    # A later part of the run neither tries them again nor writes them again.
    resumed = make_loader(numbers, position=batches[-1].position, rejected=6)
    assert next_batch(resumed).counts.rejected >= 6
    keys(resumed, 7)
    assert not {"r.json#1", "r.json#4"} & set(resumed.stream.encoder.encoder.calls)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2


def test_a_bad_clip_costs_its_questions_and_a_bad_question_only_itself(make_loader, tmp_path):
    records = [("bad.mp4", 5)] * 4 + [("a.mp4", 5), ("a.mp4", -1), ("a.mp4", 6), ("a.mp4", 7)]
    loader = make_loader(records, batch_size=8, questions_per_video=4, rate=1.0)
    batch = next_batch(loader)
    assert sorted(batch.keys) == ["r.json#4", "r.json#6", "r.json#7"] and batch.counts.clips == 1
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == [0, 1, 2, 3, 5] and batch.counts.rejected == 5
    assert [len(group) for group in loader.stream.encoder.encoder.groups[:2]] == [4, 4]


def test_five_percent_of_a_thousand_records(make_loader, tmp_path):
    """Clips of ten questions, three of them bad and twenty bad questions elsewhere: the rest is used once an epoch."""
    records = [("bad.mp4" if n % 35 == 4 else f"c{n}.mp4", 4 + i) for n in range(100) for i in range(10)]
    bad_questions = range(7, 1000, 48)
    for i in bad_questions:
        records[i] = (records[i][0], -1)
    want = {i for i, (clip, number) in enumerate(records) if clip == "bad.mp4" or number < 0}
    assert 0.045 < len(want) / 1000 < 0.055
    loader = make_loader(records, batch_size=40, questions_per_video=10, rate=0.06)
    groups = loader.stream.order.sources[0].groups  # the three bad clips are one file with thirty questions
    seen = sum(keys(loader, groups // 4), ())
    assert sorted(seen) == sorted(f"r.json#{i}" for i in range(1000) if i not in want)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == sorted(want)


def test_a_fresh_run_forgets_the_quarantine(make_loader, tmp_path):
    keys(make_loader([5, -1, 6, 7]), 4)
    assert "r.json#1" in (tmp_path / "quarantine.jsonl").read_text()
    loader = make_loader([5, 5, 6, 7], fresh=True)
    assert "r.json#1" in sum(keys(loader, 4), ()) and not (tmp_path / "quarantine.jsonl").exists()


def test_a_record_without_an_answer_is_quarantined(make_loader, tmp_path):
    keys(make_loader([5, 2, 6, 7]), 4)  # two tokens: nothing is supervised
    assert '"no_target"' in (tmp_path / "quarantine.jsonl").read_text()


class CrashOnce(FakeEncoder):
    def encode_group(self, records, cache=None):
        if not self.groups:
            self.groups.append([])
            return [RecordError("killed by a signal", "decoder_crash", r.key) for r in records]
        return super().encode_group(records)


def test_a_decoder_killed_from_outside_does_not_cost_a_record(make_loader, tmp_path):
    loader = make_loader([("a.mp4", 5)] * 4, encoder=CrashOnce(), batch_size=4, questions_per_video=4)
    assert len(next_batch(loader).keys) == 4 and not (tmp_path / "quarantine.jsonl").exists()


def test_too_many_bad_records_stop_the_run(make_loader, tmp_path):
    with pytest.raises(QuarantineError, match="max_quarantine_rate = 0.01") as caught:
        keys(make_loader([-1] * 50 + [5] * 50, rate=0.01), 40)
    assert str(tmp_path / "quarantine.jsonl") in str(caught.value)
    with pytest.raises(QuarantineError, match=r"not one usable record in .*r.json: 4 missing_file\. Every one"):
        keys(make_loader([-1] * 4, rate=1.0, fresh=True), 9)


def test_one_of_several_hosts_without_a_usable_record_goes_on(make_loader):
    loader = make_loader([-1] * 4, rate=1.0, fresh=True, batch_size=4, hosts=2)
    assert not loader.stream.barren
    keys(loader, 9)
    assert loader.stream.barren


def test_a_bug_is_not_quarantined(make_loader):
    class Broken(FakeEncoder):
        def encode_group(self, records, cache=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next_batch(make_loader([5], encoder=Broken()))


def test_several_sources_with_equal_names_and_numbers_stay_apart(make_loader, tmp_path):
    loader = make_loader([5, -1], [-1, 6, 7], rates=[0.5, 0.5], batch_size=10, rate=1.0)
    seen = sum(keys(loader, 6), ())
    assert set(seen) == {"r.json#0", "r1.json#1", "r1.json#2"}
    assert abs(seen.count("r1.json#1") - seen.count("r1.json#2")) <= 1
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((line["source"], line["index"]) for line in lines) == [(0, 1), (1, 0)]


def test_records_that_only_look_alike_are_encoded_apart(tmp_path):
    """Records of different clips in one group, as a collision of hashes would make it."""
    records = RecordFile(write_records(tmp_path / "r.json", [("a.mp4", 5), ("b.mp4", 6), ("a.mp4", 7)]), tmp_path)
    encoder = GroupEncoder([records], FakeEncoder())
    examples = encoder(Questions(0, (0, 1, 2))).examples
    assert [e.key for e in examples] == ["r.json#0", "r.json#1", "r.json#2"]
    assert encoder.encoder.groups == [["r.json#0", "r.json#2"], ["r.json#1"]]


def test_cache_is_bounded_and_drops_the_least_recent():
    media = [Media((), np.zeros(10, np.float32)) for _ in range(3)]
    cache = LeastRecentMedia(max_bytes=80)
    cache.put("a", media[0])
    cache.put("b", media[1])
    assert cache.get("a") is media[0]
    cache.put("c", media[2])
    assert cache.get("b") is None and cache.get("a") is media[0] and cache.get("c") is media[2]
    assert cache.bytes == 80
    cache.put("big", Media((), np.zeros(30, np.float32)))
    assert cache.get("big") is None and cache.bytes == 80


def test_settings_that_cannot_work(make_loader):
    with pytest.raises(LoaderError, match="questions_per_video = 4"):
        make_loader([5], batch_size=6, questions_per_video=4)
    with pytest.raises(LoaderError, match="over 2 hosts"):
        make_loader([5], batch_size=3, hosts=2)
    with pytest.raises(LoaderError, match="3 rows"):
        make_loader([5], batch_size=4, rows=3, hosts=2)


def test_options_come_from_a_config_group():
    group = {"path": "x", "questions_per_video": 4, "prefix_buckets": [8, 16], "branch_buckets": [4], "workers": 2}
    options = LoaderOptions.from_mapping(group, 8)
    assert options == LoaderOptions(8, 4, 0, workers=2)
    assert options.clips_per_row == 1 and LoaderOptions(40, 4, 3).clips_per_row == 4
