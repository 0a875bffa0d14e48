"""Held-out prompts: read ahead, decoded and parsed once, however often the policy is evaluated."""

from __future__ import annotations

import types
from collections import Counter

import jax
import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.files.jsonl import read_steps
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.stream import Limits
from mllm4d_jax.grpo.actor import Actor
from mllm4d_jax.grpo.held_out import HeldOut
from mllm4d_jax.parallel import multihost
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import as_prompt
from tests.data.fakes import FakeEncoder, write_records


class AskedEncoder(FakeEncoder):
    def encode_group(self, records, cache=None, *, add_generation_prompt=False):
        assert add_generation_prompt
        return super().encode_group(records, cache)


class CountedRecords(RecordFile):
    """Counts how often each record is parsed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.parsed = Counter()

    def __getitem__(self, i):
        self.parsed[i] += 1
        return super().__getitem__(i)


class EchoActor:
    """Rewards a prompt with the number of its text tokens, and notes what it is given."""

    def __init__(self):
        self.drawn = []

    def draw(self, found, weights, step, policy_step):
        self.drawn.append([(p.position, p.key, p.record.key) for p in found.prompts])
        rewards = [{"total": float(len(p.example.tokens))} for p in found.prompts]
        lengths = types.SimpleNamespace(tolist=lambda: [3] * len(rewards))
        return types.SimpleNamespace(rollouts=types.SimpleNamespace(rewards=rewards, lengths=lengths))


@pytest.fixture
def make_held_out(tmp_path):
    def make(*numbers):
        source = CountedRecords(write_records(tmp_path / "r.json", numbers), tmp_path)
        encoder, actor = AskedEncoder(), EchoActor()
        group_encoder = GroupEncoder([source], encoder, as_prompt=as_prompt)
        how = dict(limit=5, at_once=2, workers=0)
        return HeldOut(tmp_path / "evals.jsonl", group_encoder, actor, **how), source, encoder, actor

    return make


def test_prompts_are_read_once_and_asked_in_the_same_order_every_time(make_held_out, tmp_path):
    held_out, source, encoder, actor = make_held_out(5, -1, 6, 7, 8, 9)
    rows = [held_out.run((), step) for step in (0, 10)]
    assert source.parsed == dict.fromkeys(range(5), 1) and len(encoder.calls) == 5
    first = [(n, f"r.json#{n}", f"r.json#{n}") for n in range(5)]
    # One shape for every batch: where a prompt is missing, the first one of the batch is asked again and not counted.
    batches = [[first[0], first[0]], [first[2], first[3]], [first[4], first[4]]]
    assert actor.drawn == batches * 2
    assert rows[0] == rows[1] | {"step": 0} == read_steps(tmp_path / "evals.jsonl")[0]
    assert (rows[0]["n"], rows[0]["unusable"], rows[0]["reward"]) == (4, 1, (5 + 6 + 7 + 8) / 4)


def test_a_stop_asks_no_more_and_writes_no_row(make_held_out, tmp_path, monkeypatch):
    """Of several processes the others, too, find that one of them has stopped."""
    held_out, _, _, actor = make_held_out(5, 6, 7)
    assert held_out.run((), 0, stop=True) is None and not actor.drawn
    monkeypatch.setattr(multihost, "gather_bytes", lambda data: [data, b"null"])
    assert held_out.run((), 0) is None and actor.drawn
    assert not held_out.done(0) and not (tmp_path / "evals.jsonl").exists()


def test_the_limit_of_memory_holds_for_held_out_prompts():
    """They are asked before the first step, with as many prompts together as a step has."""
    options = SamplingOptions(temperature=1.0, require_exact=True)
    how = dict(branches=8, max_new_tokens=4, at_once=Limits(2, 3), seed=0)
    greedy = Actor(None, None, None, None, None, options, **how).greedy()
    assert (greedy.at_once, greedy.branches, greedy.options.temperature) == (Limits(2), 1, 0.0)


def test_not_one_usable(make_held_out):
    held_out, *_ = make_held_out(-1, -2)
    with pytest.raises(RecordError, match="not one of the held-out prompts can be used: 2 missing_file"):
        held_out.run((), 0)


def test_processes_share_the_prompts_and_find_the_same_means(make_held_out, tmp_path, monkeypatch):
    """Three take two, two and one of five, at one a time; one of them has none that can be used."""
    numbers, asked, told = (5, 6, -1, 7, 8), [], []
    wanted = make_held_out(*numbers)[0].run((), 0)
    (tmp_path / "evals.jsonl").unlink()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost, "together", lambda work: work())
    for process in range(3):  # what each would tell the others
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        held_out, _, _, actor = make_held_out(*numbers)
        monkeypatch.setattr(
            multihost,
            "gather_bytes",
            lambda data: told.append(data) or [b'{"found": [[0, {"total": 0}, 1]], "bad": []}'],
        )
        held_out.run((), 0)
        asked.append(sorted({place for batch in actor.drawn for place, *_ in batch}))
    assert asked == [[0, 3], [1, 4], []]
    monkeypatch.setattr(multihost, "gather_bytes", lambda data: told)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert make_held_out(*numbers)[0].run((), 7) == wanted | {"step": 7}
    assert [row["step"] for row in read_steps(tmp_path / "evals.jsonl")] == [0, 7]  # the first one writes
