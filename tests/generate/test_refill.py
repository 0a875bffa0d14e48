"""Completions that begin where others have ended: to the bit what they are alone, by few programs, few places idle."""

from __future__ import annotations

import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mllm4d_jax.generate.completions import first_stop
from mllm4d_jax.generate.decoding import PromptCache
from mllm4d_jax.generate.inputs import Prompts
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.generate.stream import CompletionStream, Limits
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.text import KVCache
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.pack import place_branches
from mllm4d_jax.rows.rows import collate_rows, needed_sizes
from tests.generate.fakes import FakeSampler, run
from tests.generate.test_sampler import ENDING, LIMITS, model, prompts, row, same, sample, sampler, sixteen
from tests.generate.test_sampler_rows import ENDING as ENDING_ROWS
from tests.generate.test_sampler_rows import LIMIT, asked_alone, groups, make_sampler, rows, visual_ids

FEW = dict(branches=3, limits=Limits(4, 2))  # 4 of 16 prompts, 2 of 3 completions of each


@functools.lru_cache
def refilling(form="stacked"):
    return sampler(chunk=5, form=form)


def sample_few(inputs=None, ids=None, form="stacked", max_new_tokens=LIMITS, seed=0, **options):
    inputs = prompts() if inputs is None else inputs
    call = FEW | dict(max_new_tokens=max_new_tokens, seed=seed, detokenize=lambda ids: "".join(f"[{i}]" for i in ids))
    return sample(inputs, ids=ids, of=refilling(form), call=call, **ENDING | options)


@functools.lru_cache
def few(form="stacked"):
    return sample_few(form=form)


@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_completions_are_those_of_all_at_once(form):
    same(few(form), sixteen()[0])


def test_a_prompt_alone_gives_the_same_bits():
    """In arrays of the same shape nothing differs, not even how sums are ordered."""
    together = few()
    for i in (0, 5, 15):  # among the first, in the middle, at the end
        alone, size = sample_few(row(prompts(), i), [100 + i], max_new_tokens=24), LIMITS[i, 0]
        np.testing.assert_array_equal(alone.tokens[0, :, :size], together.tokens[i, :, :size])
        np.testing.assert_array_equal(alone.logprobs[0, :, :size], together.logprobs[i, :, :size])


def test_places_are_used_and_programs_are_few():
    out, compiles = few().statistics, refilling().compiles
    sample_few(seed=7)
    assert refilling().compiles == compiles  # prefill, caches, insertion, decode steps: each for one shape
    useful = int((few().lengths - 1).sum())
    assert out.branch_steps == 8 * out.steps and out.wasted_branch_steps == out.branch_steps - useful
    parts = []
    for at in range(0, 16, 4):  # as many places for some prompts after the other
        chosen = jax.tree.map(lambda x, at=at: x[:, at : at + 4] if x.ndim == 3 else x[at : at + 4], prompts())
        call = FEW | dict(max_new_tokens=LIMITS[at : at + 4])
        parts.append(sample(chosen, ids=range(100 + at, 104 + at), of=refilling(), call=call, **ENDING).statistics)
    assert out.wasted_branch_steps < 0.8 * sum(p.wasted_branch_steps for p in parts)
    assert out.steps < 0.9 * sum(p.steps for p in parts)


def test_the_counts_are_those_of_the_lengths_alone():
    """Of programs that compute nothing, with which slots are counted elsewhere."""
    fake = FakeSampler(5, Ladder(first_slots=32, compact=False))
    found = run(fake, few().lengths, Limits(4, 2))[0].statistics
    for name in ("steps", "branch_steps", "wasted_branch_steps"):
        assert getattr(found, name) == getattr(few().statistics, name)
    assert [steps for steps, _ in found.chunks] == [steps for steps, _ in few().statistics.chunks]


def test_stop_texts_end_completions_here_too():
    text = "][".join(map(str, few().tokens[0, 0, 1:3]))
    out, whole = sample_few(stop=(text,)), few()
    for place in np.ndindex(16, 3):
        ids = whole.tokens[place][: whole.lengths[place]].tolist()
        end = first_stop(ids, 0, [text], lambda ids: "".join(f"[{i}]" for i in ids)) or len(ids)
        assert out.lengths[place] == end and out.tokens[place][:end].tolist() == ids[:end]
    assert out.finish_reason[0][0] == "stop_string"


def test_completions_that_the_first_token_ends_make_room_at_once():
    """A row that prefill alone has filled is free for the next prompt before anything is decoded beside it."""
    limits = LIMITS.copy()
    limits[[0, 1, 5, 6, 7, 12]] = 1
    out, whole = sample_few(max_new_tokens=limits), few()
    np.testing.assert_array_equal(out.lengths, np.minimum(whole.lengths, limits))
    for place in np.ndindex(16, 3):
        size = out.lengths[place]
        np.testing.assert_array_equal(out.tokens[place][:size], whole.tokens[place][:size])
    assert all(steps for steps, _ in out.statistics.chunks)


def test_rows_on_several_devices():
    """Four prompts are prefilled together, one on each device, into rows of any device; key heads are split as well."""
    mesh = make_mesh(dict(data=4, tensor=2))
    call = dict(branches=3, max_new_tokens=LIMITS, limits=Limits(4, 2))
    of = sampler(mesh=mesh, chunk=5)
    same(sample(prompts(), mesh=mesh, of=of, call=call, **ENDING), sixteen()[0])


def test_insertion_exchanges_what_arrived_alone():
    """Two prompts of 8 tokens into rows of other devices: nothing as large as what a device has of the caches."""
    mesh, dtype = make_mesh(dict(data=2, tensor=2), jax.devices()[:4]), np.float32
    split = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), "tensor"))

    def cache(rows, length):
        kv = KVCache(*[jax.ShapeDtypeStruct((2, rows, 2, length, 8), dtype, sharding=split)] * 2)
        visible = jax.ShapeDtypeStruct((rows, length), bool, sharding=NamedSharding(mesh, PartitionSpec()))
        return PromptCache(kv, visible)

    own = KVCache(*[jax.ShapeDtypeStruct((2, 8, 2, 3, 64, 8), dtype, sharding=split)] * 2)
    rows = jax.ShapeDtypeStruct((2,), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    program = sampler(mesh=mesh).lower("insert", rows, cache(2, 8), None, cache=cache(8, 64), own=own).compile()
    names = "all-gather|all-reduce|all-to-all|collective-permute"
    exchanged = re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{names})\(", program.as_text())
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in exchanged]
    assert sizes and max(sizes) <= 2 * 2 * 1 * 8 * 8
    made = program.memory_analysis()
    assert made.temp_size_in_bytes < 4 * 2 * 4 * 1 * 64 * 8  # the prompts' keys on a device; all is written in place


def keep_the_cache(monkeypatch):
    """Every prompt but the first ones finds the cache of the one before it."""
    insert, count = refilling().insert, itertools.count()

    def kept(*arrived, **caches):
        return insert(*arrived, **caches) if next(count) < 4 else tuple(caches.values())

    monkeypatch.setattr(refilling(), "insert", kept)


def keep_the_positions(monkeypatch):
    """Every branch but the first ones goes on where the one before it ended."""
    feed, last = CompletionStream._feed, {}

    def kept(self):
        sent, used = feed(self)
        for place in map(tuple, np.argwhere(used)):
            number = int(self._packing.rows[place[0]]), int(self._packing.branches[place])
            begun, at = last.setdefault(place, (number, 0))
            if begun != number:
                last[place] = number, at
                sent.next_position[place] += at
            last[place] = last[place][0], at + 1
        return sent, used

    monkeypatch.setattr(CompletionStream, "_feed", kept)


@pytest.mark.parametrize("broken", [keep_the_cache, keep_the_positions])
def test_a_place_that_keeps_something_is_noticed(broken, monkeypatch):
    expected = few()
    broken(monkeypatch)
    found = sample_few()
    assert not np.array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.tokens[0], expected.tokens[0])  # the first prompts had no predecessor


def test_questions_of_several_clips_make_room_for_others():
    """Rows of different sizes, two at a time: caches grow when longer ones come, or ones with more questions."""
    name, geometry = "qwen3_vl", vision_geometry(model("qwen3_vl").config)
    alone, places = asked_alone(name, **ENDING_ROWS), rows(name)[1]  # in the order of the questions
    found, asked, packing = {}, [], make_sampler(name, chunk=6)

    def waiting():
        for number in (2, 1, 0):  # a text, images, a video with more and longer questions
            sizes = needed_sizes([[groups(name)[number]]], geometry)
            inputs = collate_rows([[groups(name)[number]]], sizes, geometry, visual_token_ids=visual_ids(name)).inputs
            ids = np.zeros((1, inputs.layout.slots), np.int64)
            slots = place_branches([groups(name)[number].branches], inputs.layout.length)[0][0]
            numbers = [n for n, (clip, _) in enumerate(places) if clip == number]
            ids[0, [slot for slot, _ in slots]] = [50 + n for n in numbers]
            asked.append([(n, slot) for n, (slot, _) in zip(numbers, slots, strict=True)])
            yield Prompts.checked(inputs, ids, inputs.layout.slots, LIMIT)

    weights, how = (nnx.state(model(name)),), dict(options=SamplingOptions(**ENDING_ROWS), limits=Limits(2))
    with jax.default_matmul_precision("highest"):
        for number, out in packing.stream(weights, waiting(), **how):
            found |= {n: (out, slot) for n, slot in asked[number]}
    assert found.keys() == set(range(7))
    for n, (out, slot) in found.items():
        size = alone.lengths[n, 0]
        assert out.lengths[0, slot] == size and out.finish_reason[0][slot] == alone.finish_reason[n][0]
        np.testing.assert_array_equal(out.tokens[0, slot, :size], alone.tokens[n, 0, :size])
        np.testing.assert_allclose(out.logprobs[0, slot, :size], alone.logprobs[n, 0, :size], atol=1e-4)


def test_prompts_that_are_refused():
    two = jax.tree.map(lambda x: x[:, :2] if x.ndim == 3 else x[:2], prompts())
    both = Prompts.checked(two, [1, 2], 3, 4)
    with pytest.raises(ValueError, match="2 prompts together, where 1 are prefilled at a time"):
        list(refilling().stream((nnx.state(model()),), [both], options=SamplingOptions(), limits=Limits(2)))
