"""Prompts from records: the order of the data kept, unusable ones passed over."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import open_mixture
from mllm4d_jax.data.stream import GroupStream, LoaderOptions
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.grpo.prompts import PromptLoader
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import as_scored_prompt


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
    assert prompt.question.startswith(("Which way", "How many")) and prompt.media[0].endswith(".mp4")
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
