"""Prompts from records: the order of the data kept, unusable ones passed over."""

from __future__ import annotations

import concurrent.futures
import json
import threading
from collections import Counter

import numpy as np
import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Mixture, open_mixture
from mllm4d_jax.data.stream import GroupStream, LoaderOptions
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.grpo.prompts import PromptLoader
from mllm4d_jax.parallel import multihost
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import as_prompt, as_scored_prompt
from tests.data.fakes import FakeEncoder, write_records


@pytest.fixture
def make_loader(tiny_world, tmp_path):
    model, folder = tiny_world
    encoder = Encoder(
        ProcessorConfig.from_folder(model), Tokenizer.from_folder(model), VideoOptions(num_frames=4, max_pixels=4096)
    )

    def make(path=folder / "r1.jsonl", prompts=3, position=0, workers=0):
        mixture = open_mixture(str(path), str(folder), ())
        group_encoder = GroupEncoder(mixture.sources, encoder, as_prompt=as_scored_prompt)
        quarantine = Quarantine(tmp_path / "q.jsonl", 0.9, fresh=position == 0)
        options = LoaderOptions(batch_size=1, workers=workers, ahead=prompts, seed=3)
        return PromptLoader(GroupStream(mixture, group_encoder, quarantine, options, position), prompts)

    with encoder:
        yield make


def test_steps_follow_the_order_and_any_of_them_can_be_the_first(make_loader):
    loader = make_loader()
    steps = [loader.next_step() for _ in range(4)]
    assert [s.position for s in steps] == [3, 6, 9, 12]
    assert len({p.key for s in steps for p in s.prompts if p.position < 8}) == 8  # an epoch takes each once
    again = make_loader(position=6).next_step()
    assert [p.key for p in again.prompts] == [p.key for p in steps[2].prompts]
    prompt = steps[0].prompts[0]
    assert prompt.example.text.endswith("<|im_start|>assistant\n") and not prompt.example.supervised.any()
    assert "Frames are counted from 0." in prompt.question and prompt.media[0].endswith(".mp4")
    assert prompt.described()["solution"][0]["answer"] in "ABCD"


def test_a_record_is_parsed_once(make_loader, monkeypatch):
    parsed, parse = Counter(), RecordFile.__getitem__
    monkeypatch.setattr(RecordFile, "__getitem__", lambda self, i: parsed.update([i]) or parse(self, i))
    with make_loader(prompts=2) as loader:  # these two and those read ahead are of one epoch
        loader.next_step()
    assert len(parsed) >= 2 and set(parsed.values()) == {1}


def test_worker_processes_make_prompts_too(make_loader):
    with make_loader(workers=1) as loader:
        found = loader.next_step().prompts
    for a, b in zip(found, make_loader().next_step().prompts, strict=True):
        assert a.key == b.key and (a.example.tokens == b.example.tokens).all()
    assert all(p.example.text.endswith("<|im_start|>assistant\n") for p in found)


def test_prompts_given_before_are_given_again(make_loader):
    loader = make_loader()
    given = loader.next_step().prompts
    again = make_loader(position=5).again([p.position for p in given])
    for a, b in zip(given, again, strict=True):
        assert (a.key, a.position, a.record) == (b.key, b.position, b.record)
        assert (a.example.tokens == b.example.tokens).all() and (a.example.patches == b.example.patches).all()


def test_a_file_without_a_usable_record_is_an_error(make_loader, tiny_world, tmp_path):
    line = json.loads((tiny_world[1] / "r1.jsonl").read_text().splitlines()[0])
    far = [{"answer": "A", "camera_center": [1.7e308, 0, 0]}]
    bad = [line | {"solution": None}, line | {"solution": far}, line | {"videos": ["\udc80.mp4"]}]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(QuarantineError, match=r"not one usable record in .*bad.jsonl: 2 bad_solution, 1 bad_path\."):
        make_loader(path).next_step()


def test_an_unusable_record_is_passed_over(make_loader, tiny_world, tmp_path):
    _, folder = tiny_world
    lines = (folder / "r1.jsonl").read_text().splitlines()
    bad = json.loads(lines[0]) | {"solution": None}
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([*lines[:2], json.dumps(bad), *lines[2:]]) + "\n")
    loader = make_loader(path)
    steps = [loader.next_step() for _ in range(3)]
    assert all(len(step.prompts) == 3 for step in steps)
    assert steps[-1].position > 9 and steps[-1].rejected >= 1
    assert all(p.record.solution is not None for step in steps for p in step.prompts)
    with pytest.raises(RecordError, match="solution"):
        position = next(n for n in range(9) if loader._stream.order[n].indices == (2,))
        loader.again([position])


class Asked(FakeEncoder):
    def encode_group(self, records, cache=None, *, add_generation_prompt=False):
        assert add_generation_prompt
        return super().encode_group(records, cache)


class Meeting:
    """Processes as threads that tell each other numbers."""

    def __init__(self, processes):
        self.barrier, self.told, self.me = (
            threading.Barrier(processes, timeout=60),
            [None] * processes,
            threading.local(),
        )

    def gather(self, numbers):
        self.told[self.me.host] = list(numbers)
        self.barrier.wait()
        found = np.array(self.told)
        self.barrier.wait()
        return found


@pytest.mark.parametrize("bad", [(), (3, 4, 5), (0, 2, 4, 6, 8, 10)])
def test_the_prompts_of_a_step_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch, bad):
    """Nor does the state after it; each has equally many, also where all that it reads is unusable."""
    source = RecordFile(write_records(tmp_path / "r.json", [-1 if i in bad else 5 for i in range(11)]), tmp_path)

    def steps_of(hosts, start=0):
        meeting = Meeting(hosts)
        monkeypatch.setattr(multihost, "gather", meeting.gather)

        def process(host):
            meeting.me.host = host
            options, encoder = (
                LoaderOptions(6, seed=1, host=host, hosts=hosts),
                GroupEncoder([source], Asked(), as_prompt=as_prompt),
            )
            quarantine = Quarantine(tmp_path / f"q{hosts}-{start}.jsonl", 1.0, host=host)
            with PromptLoader(GroupStream(Mixture([source]), encoder, quarantine, options, start), 6) as loader:
                return [loader.next_step() for _ in range(4)]

        with concurrent.futures.ThreadPoolExecutor(hosts) as pool:
            found = list(zip(*pool.map(process, range(hosts)), strict=True))
        assert all(len(part.prompts) == 6 // hosts for parts in found for part in parts)
        states = [{(part.position, part.rejected) for part in parts} for parts in found]
        return [sorted((p.position, p.key) for part in parts for p in part.prompts) for parts in found], states

    alone, states = steps_of(1)
    assert all(len(one) == 1 for one in states)
    for hosts in (2, 3, 6):
        assert steps_of(hosts) == (alone, states)
    ((position, _),) = states[1]
    for hosts in (1, 3):  # others go on from where two steps have come to
        assert steps_of(hosts, position)[0][:2] == alone[2:]


def test_what_one_process_cannot_read_ends_all(tmp_path, monkeypatch):
    """Where too many records of one of them are unusable, and where one was asked to stop."""
    source = RecordFile(write_records(tmp_path / "r.json", [5] * 40), tmp_path)
    meeting = Meeting(2)
    monkeypatch.setattr(multihost, "gather", meeting.gather)

    def process(host, broken, stop):
        meeting.me.host = host
        options, encoder = LoaderOptions(2, host=host, hosts=2), GroupEncoder([source], Asked(), as_prompt=as_prompt)
        quarantine = Quarantine(tmp_path / "q.jsonl", 1.0, host=host)
        with PromptLoader(GroupStream(Mixture([source]), encoder, quarantine, options), 2) as loader:
            if host == broken:
                monkeypatch.setattr(loader._stream, "next_groups", fail)
            try:
                return loader.next_step(host == stop)
            except ValueError as error:
                return error

    def fail(*_):
        raise QuarantineError("41 of the first 40")

    def both(**which):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda host: process(host, which.get("broken"), which.get("stop")), range(2)))

    other, own = both(broken=1)
    assert isinstance(own, QuarantineError) and isinstance(other, multihost.OtherProcessError)
    assert "process 1 of 2 cannot go on" in str(other)
    assert both(stop=0) == [None, None] and all(len(step.prompts) == 1 for step in both())
