"""Questions about a video answered together, over its shared prefix, give what each gives alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.generate.decoding import PromptCache, prefill_branches
from mllm4d_jax.generate.inputs import fill_rows
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.batch import ModelInputs, RowLayout, collate
from mllm4d_jax.rows.pack import place_branches
from mllm4d_jax.rows.rows import collate_rows, needed_sizes, share_prefix
from tests.generate.test_sampler import GOLDEN, model
from tests.models.test_shared_prefix import VIDEO, make_examples

CLIPS = ((VIDEO, 4), ((Grid("image", 1, 4, 4), Grid("image", 1, 2, 4)), 2), ((), 1))
LIMIT = 14
ENDING = dict(temperature=1.3, eos_ids=tuple(range(1, 60)))


@functools.lru_cache
def groups(name):
    """A video with 4 questions of different lengths, images with 2, and a text with 1."""
    config, rng, found = ProcessorConfig.from_folder(GOLDEN / name), np.random.default_rng(3), []
    for clip, (grids, count) in enumerate(CLIPS):
        examples = [
            dataclasses.replace(e, key=f"{clip}.{i}", supervised=np.zeros(len(e.tokens), bool))
            for i, e in enumerate(make_examples(rng, config, grids, count))
        ]
        found += share_prefix(examples, visual_ids(name))
    assert [len(g.examples) for g in found] == [4, 2, 1] and len(set(found[0].branches)) > 2
    return found


def visual_ids(name):
    config = model(name).config
    return config.image_token_id, config.video_token_id


@functools.lru_cache
def rows(name):
    """(shared-prefix rows with slots longer than any question, (row, slot) of every question in order)."""
    geometry = vision_geometry(model(name).config)
    packed = [[g] for g in groups(name)]
    sizes = needed_sizes(packed, geometry)
    sizes = dataclasses.replace(sizes, length=sizes.length + 3)
    inputs = collate_rows(packed, sizes, geometry, visual_token_ids=visual_ids(name)).inputs
    places = [place_branches([g.branches], sizes.length)[0][0] for g in groups(name)]
    return inputs, [(row, slot) for row, found in enumerate(places) for slot, _ in found]


@functools.lru_cache
def asked_alone(name, **options):
    """Every question as a prompt in a row of its own, with its own copy of the clip."""
    examples = [e for g in groups(name) for e in g.examples]
    inputs = collate(examples, vision_geometry(model(name).config), visual_token_ids=visual_ids(name))
    return generate(name, inputs, list(range(50, 50 + len(examples))), 1, **options)


def generate(name, inputs, ids, branches, mesh=None, limit=LIMIT, of=None, features=None, prefix=None, **options):
    made = model(name, mesh)
    sampler = of or make_sampler(name, mesh)
    with jax.default_matmul_precision("highest"):
        return sampler.generate(
            (nnx.state(made),), inputs, prompt_ids=ids, branches=branches, max_new_tokens=limit,
            options=SamplingOptions(**options), features=features, prefix=prefix,
        )  # fmt: skip


@functools.lru_cache
def make_sampler(name, mesh=None, chunk=LIMIT, compact=False, form="stacked"):
    shards = 1 if mesh is None else mesh.shape["data"]
    ladder = Ladder(4, shards, 32, compact)
    return Sampler(nnx.split(model(name, mesh))[0], mesh, chunk=chunk, ladder=ladder, form=form)


def numbered(name, inputs, places):
    """Prompt ids [B, N] of the questions at their places."""
    ids = np.zeros((len(inputs.tokens), inputs.layout.slots), np.int64)
    for n, place in enumerate(places):
        ids[place] = 50 + n
    return ids


def together(name, **options):
    inputs, places = rows(name)
    return generate(name, inputs, numbered(name, inputs, places), inputs.layout.slots, **options), places


def check(out, places, alone):
    lengths = [int(out.lengths[place]) for place in places]
    assert lengths == alone.lengths[:, 0].tolist()
    for n, place in enumerate(places):
        size = out.tokens.shape[-1]
        np.testing.assert_array_equal(out.tokens[place], alone.tokens[n, 0, :size])
        np.testing.assert_allclose(out.logprobs[place], alone.logprobs[n, 0, :size], atol=1e-4)
        assert out.finish_reason[place[0]][place[1]] == alone.finish_reason[n][0]


# Tests of evaluation answer greedily with a small Qwen3-VL as well.
@pytest.mark.parametrize("name", [pytest.param("qwen3_vl", marks=pytest.mark.slow), "qwen2_5_vl"])
def test_greedy_answers_equal_those_of_one_question_at_a_time(name):
    alone = asked_alone(name)
    assert len({tuple(t) for t in alone.tokens[:, 0].tolist()}) == 7  # no two questions have the same answer
    check(*together(name), alone)


@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_sampled_answers_too_packed_as_they_end(form):
    """Every question has its own limit as well."""
    alone, (_, places) = asked_alone("qwen3_vl", **ENDING), rows("qwen3_vl")
    limits = np.full((3, 4), 9)
    limits[0] = 3, LIMIT, 2, LIMIT
    packing = make_sampler("qwen3_vl", chunk=6, compact=True, form=form)
    out, _ = together("qwen3_vl", of=packing, limit=limits, **ENDING)
    ended = [n for n in range(7) if "stop" in alone.finish_reason[n]]
    assert ended and alone.lengths.max() == LIMIT
    for n, place in enumerate(places):
        size = min(alone.lengths[n, 0], limits[place])
        assert out.lengths[place] == size
        np.testing.assert_array_equal(out.tokens[place][:size], alone.tokens[n, 0, :size])
        np.testing.assert_allclose(out.logprobs[place][:size], alone.logprobs[n, 0, :size], atol=1e-4)
    assert out.statistics.compactions >= 1  # fewer branches; their caches have room for new tokens from the start
    empty = {(r, s) for r in range(3) for s in range(4)} - set(places)
    assert len(empty) == 5 and all(out.lengths[place] == 1 for place in empty)  # given up at once


@pytest.mark.slow  # tests of evaluation run on eight devices too
def test_eight_devices_give_the_same():
    """Three rows on eight devices: rows are repeated together with their frames."""
    mesh = make_mesh(dict(data=8))
    check(*together("qwen3_vl", mesh=mesh, **ENDING), asked_alone("qwen3_vl", **ENDING))


@pytest.mark.slow
def test_features_computed_before_are_used_and_repeated_with_their_rows():
    inputs, places = rows("qwen3_vl")
    with jax.default_matmul_precision("highest"):
        features = nnx.jit(lambda m, v: m.encode_vision(v))(model("qwen3_vl"), inputs.vision)
    filled, more = fill_rows(inputs._replace(vision=None), features, np.array([0, 1, 2, 0]))
    rows_of = np.asarray(more.merged).reshape(4, -1, more.merged.shape[-1])
    np.testing.assert_array_equal(rows_of[3], rows_of[0])
    ids = numbered("qwen3_vl", filled, places)
    out = generate("qwen3_vl", filled, ids, inputs.layout.slots, features=more)
    check(out, places, asked_alone("qwen3_vl"))


@pytest.mark.slow  # `tests/eval/test_session.py` has the tiny Qwen3-VL
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_a_prefix_that_was_run_before_gives_the_same(name):
    group, alone, ids = groups(name)[0], asked_alone(name), visual_ids(name)
    beginning, sampler, weights = group.examples[0], make_sampler(name), (nnx.state(model(name)),)
    cut = dict(tokens=beginning.tokens[: group.shared], positions=beginning.positions[:, : group.shared])
    first = dataclasses.replace(beginning, supervised=beginning.supervised[: group.shared], **cut)
    geometry, length = vision_geometry(model(name).config), max(group.branches) + 3
    with jax.default_matmul_precision("highest"):
        prefix = sampler.prefix(weights, collate([first], geometry, visual_token_ids=ids, length=group.shared + 5))
    for n, (example, tokens) in enumerate(zip(group.examples, group.branches, strict=True)):
        pad = [(0, length - tokens)]
        row = [
            np.pad(x[group.shared :], pad).astype(np.int32)[None]
            for x in (example.tokens, np.ones_like(example.tokens))
        ]
        positions = np.pad(example.positions[:, group.shared :], [(0, 0), *pad]).astype(np.int32)[:, None]
        none = np.full((1, length), -1, np.int32)
        inputs = ModelInputs(row[0], positions, row[1], none, None, RowLayout(0, 1, length, packed=False))
        out = generate(name, inputs, [[50 + n]], 1, of=sampler, prefix=prefix)
        np.testing.assert_array_equal(out.tokens[0, 0], alone.tokens[n, 0, : out.tokens.shape[-1]])
        np.testing.assert_allclose(out.logprobs[0, 0], alone.logprobs[n, 0, : out.tokens.shape[-1]], atol=1e-4)


def test_rows_are_checked():
    inputs, places = rows("qwen3_vl")
    with pytest.raises(ValueError, match="branches of shared-prefix rows are needed, without prefixes"):
        prefill_branches(model("qwen3_vl"), inputs, None)
    two = PromptCache(None, np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="2 prefixes for 3 rows"):
        generate("qwen3_vl", inputs, numbered("qwen3_vl", inputs, places), 4, prefix=two)
    ids = numbered("qwen3_vl", inputs, places)
    with pytest.raises(ValueError, match="2 branches for rows of 4 branch slots"):
        generate("qwen3_vl", inputs, ids[:, :2], 2)
    with pytest.raises(ValueError, match="3 prompt ids for 12 prompts"):
        generate("qwen3_vl", inputs, [1, 2, 3], 4)
    segments = inputs.segment_ids.copy()
    segments[1, 2] = 2
    with pytest.raises(ValueError, match="row 1 has 2 clips"):
        generate("qwen3_vl", inputs._replace(segment_ids=segments), ids, 4)
    segments = inputs.segment_ids.copy()
    segments[0, inputs.layout.prefix] = 0
    with pytest.raises(ValueError, match="without gaps"):
        generate("qwen3_vl", inputs._replace(segment_ids=segments), ids, 4)
