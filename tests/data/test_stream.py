"""Groups in their global order, without rows: places, bad records, resume, hosts."""

from __future__ import annotations

import time

import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.data.stream import GroupStream, LoaderError, LoaderOptions
from mllm4d_jax.qa.errors import RecordError
from tests.data.fakes import FakeEncoder, write_records

NUMBERS = [("a.mp4", 5), ("a.mp4", -1), ("b.mp4", 6), ("b.mp4", 7), ("c.mp4", 8), ("c.mp4", 9), ("c.mp4", 2)]


def unchanged(record):
    return record


@pytest.fixture
def make_stream(tmp_path):
    source = RecordFile(write_records(tmp_path / "r.json", NUMBERS), tmp_path)

    def make(encoder=None, prompts=False, name="q.jsonl", position=0, per_group=1, step_groups=4, **options):
        chosen = LoaderOptions(step_groups * per_group, per_group, **options)
        group_encoder = GroupEncoder([source], encoder or FakeEncoder(), as_prompt=unchanged if prompts else None)
        quarantine = Quarantine(tmp_path / name, 1.0, fresh=True)
        return GroupStream(Mixture([source]), group_encoder, quarantine, chosen, position)

    return make


def test_items_are_the_groups_of_the_order(make_stream):
    stream = make_stream(per_group=2)
    items = [item for _ in range(6) for item in stream.next_groups()]
    assert stream.position == 24 and [item.questions.position for item in items] == list(range(24))
    tried = set()
    for item in items:
        assert item.questions == stream.order[item.questions.position]
        asked = [i for i in item.questions.indices if i not in tried]
        assert list(item.results) == asked
        bad = set(item.errors)
        assert bad == {1, 6} & set(asked)  # made to fail; nothing to learn from
        assert [e.key for e in item.examples] == [f"r.json#{i}" for i in asked if i not in bad]
        tried |= bad
    assert stream.quarantine.rejected == sum(len({1, 6} & set(i.questions.indices)) for i in items)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_each_step_and_any_step_can_be_the_first(make_stream, hosts):
    whole = make_stream()
    want = [whole.next_groups() for _ in range(5)]
    parts = [make_stream(position=8, host=h, hosts=hosts, name=f"q{h}.jsonl") for h in range(hosts)]
    for step in want[2:]:
        found = [part.next_groups() for part in parts]
        for host, items in enumerate(found):
            assert [i.questions for i in items] == [i.questions for i in step[host::hosts]]


class FailsOnce(FakeEncoder):
    """Cannot read a record the first time."""

    def _encode(self, record):
        first = record.key not in self.calls
        example = super()._encode(record)
        return RecordError("made to fail", "timeout", record.key) if first and record.key == "r.json#2" else example


def test_a_record_stays_left_out_once_it_failed_however_far_ahead_others_read_it(make_stream):
    """Read again before it was known to be unusable, as by a worker process, which never hears of it."""
    encoder = FailsOnce()
    with make_stream(encoder, step_groups=7, ahead=4) as stream:
        stream._reader.start()
        deadline = time.monotonic() + 60
        while encoder.calls.count("r.json#2") < 2:  # of the next epochs
            assert time.monotonic() < deadline, "nothing is read ahead"
            time.sleep(0.01)
        for n in range(1, 4):
            assert all(2 not in group.results or group.errors for group in stream.next_groups())
            assert stream.quarantine.rejected == 3 * n


def test_prompts_need_nothing_to_learn(make_stream):
    class Asked(FakeEncoder):
        def encode_group(self, records, cache=None, *, add_generation_prompt=False):
            assert add_generation_prompt
            return super().encode_group(records, cache)

    stream = make_stream(Asked(), prompts=True, step_groups=7)
    usable = {i for item in stream.next_groups() for i in item.results.keys() - item.errors.keys()}
    assert usable == {0, 2, 3, 4, 5, 6}


def test_a_stopped_stream_gives_nothing(make_stream):
    stream = make_stream()
    assert stream.next_groups(stop=True) is None and stream.position == 0


def test_settings_that_cannot_work(make_stream):
    with pytest.raises(LoaderError, match="over 3 hosts"):
        make_stream(hosts=3)
