"""Sampling with a model: equal to teacher forcing, independent of neighbours, devices, chunks and packing."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from mllm4d_jax.generate.policy import SamplingOptions, token_scores
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.text import KVCache
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.verify.reference import build_case, read_arrays

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LIMITS = 3 + 7 * np.arange(16)[:, None] % 22  # 3 to 24 tokens
ENDING = dict(temperature=1.3, eos_ids=tuple(range(1, 40)))


@functools.lru_cache
def model(name="qwen3_vl", mesh=None):
    return load_model(GOLDEN / name, dtype=jnp.float32, attention="xla", mesh=mesh)


@functools.lru_cache
def sampler(name="qwen3_vl", mesh=None, chunk=32, slots=32, compact=False, form="stacked"):
    shards = 1 if mesh is None else mesh.shape["data"]
    graphdef, _ = nnx.split(model(name, mesh))
    ladder = Ladder(shards=shards, first_slots=slots, compact=compact)
    return Sampler(graphdef, mesh, chunk=chunk, ladder=ladder, form=form)


def sample(inputs, *, name="qwen3_vl", mesh=None, ids=None, of=None, weights=None, call=None, **options):
    settings = dict(branches=1, max_new_tokens=12) | (call or {})
    weights = (nnx.state(model(name, mesh)),) if weights is None else weights
    ids = range(100, 100 + len(inputs.tokens)) if ids is None else ids
    chosen = of or sampler(name, mesh)
    with jax.default_matmul_precision("highest"):
        return chosen.generate(weights, inputs, prompt_ids=list(ids), options=SamplingOptions(**options), **settings)


def recorded(name, case="batch"):
    return build_case(case, read_arrays(GOLDEN / name / f"{case}.npz"), model(name).config, "release")


@functools.lru_cache
def full_pass(name):
    return nnx.jit(lambda m, x: m(x))


@functools.lru_cache
def prompts(count=16, width=10):
    """Right-padded random text of different lengths."""
    rng = np.random.default_rng(4)
    segments = (np.arange(width) < rng.integers(3, width + 1, (count, 1))).astype(np.int32)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), (3, count, width)) * segments
    tokens = rng.integers(1, 300, (count, width)).astype(np.int32) * segments
    return ModelInputs(tokens, positions, segments, np.full((count, width), -1, np.int32), None)


def row(inputs, i):
    return jax.tree.map(lambda x: x[:, i : i + 1] if x.ndim == 3 else x[i : i + 1], inputs)


def teacher_forced(name, inputs, tokens):
    """Hidden states [B, G, T, H] that predict the given tokens, from full rows of prompt and completion."""
    b, g, t = tokens.shape
    p, rows = inputs.tokens.shape[1], np.repeat(np.arange(b), g)
    after = inputs.positions.max((0, 2))[rows, None] + 1 + np.arange(t)
    full = inputs._replace(
        tokens=np.concatenate([inputs.tokens[rows], tokens.reshape(-1, t)], 1),
        positions=np.concatenate([inputs.positions[:, rows], np.broadcast_to(after, (3, *after.shape))], 2),
        segment_ids=np.pad(inputs.segment_ids[rows], ((0, 0), (0, t)), constant_values=1),
        vision_index=np.pad(inputs.vision_index[rows], ((0, 0), (0, t)), constant_values=-1),
    )
    hidden = full_pass(name)(model(name), jax.tree.map(jnp.asarray, full))
    last = np.array([np.flatnonzero(s)[-1] for s in inputs.segment_ids])[rows, None]
    places = np.concatenate([last, np.broadcast_to(p + np.arange(t - 1), (b * g, t - 1))], 1)
    return jnp.take_along_axis(hidden, places[..., None], 1).reshape(b, g, t, -1)


def same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    assert a.finish_reason == b.finish_reason
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


# "apart" is how GPUs decode: one array a layer, products joined.
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen3_vl", "stacked"),
        ("qwen2_5_vl", "stacked"),
        ("qwen2_5_vl", "apart"),
        ("qwen3_vl_moe", "stacked"),
        ("qwen3_vl_moe", "apart"),
    ],
)
def test_greedy_equals_the_recording(name, form):
    expected, of = recorded(name).arrays["gen_ids"], sampler(name, form=form)
    out = sample(recorded(name).inputs, name=name, of=of, call=dict(branches=2, max_new_tokens=expected.shape[1]))
    for branch in range(2):
        np.testing.assert_array_equal(out.tokens[:, branch], expected)
    assert out.finish_reason == (("length",) * 2,) * len(expected)


def test_right_padding_gives_the_same():
    right = recorded("qwen3_vl", "batch_right").inputs
    assert not np.array_equal(right.segment_ids, recorded("qwen3_vl").inputs.segment_ids)
    expected = recorded("qwen3_vl").arrays["gen_ids"]
    call = dict(branches=2, max_new_tokens=expected.shape[1])
    np.testing.assert_array_equal(sample(right, call=call).tokens[:, 0], expected)


@pytest.mark.parametrize(("name", "temperature"), [("qwen3_vl", 0.0), ("qwen3_vl", 0.7), ("qwen2_5_vl", 0.7)])
def test_greedy_and_sampled_equal_teacher_forcing(name, temperature):
    banned, inputs = (3, 4, 5), prompts(4)
    out = sample(inputs, name=name, call=dict(branches=2, max_new_tokens=8), temperature=temperature, banned_ids=banned)
    with jax.default_matmul_precision("highest"):
        hidden = teacher_forced(name, inputs, out.tokens)
        hidden, head = hidden.reshape(-1, hidden.shape[-1]), model(name).head_kernel()
        expected = token_scores(hidden[None], head, out.tokens.reshape(1, -1), temperature or 1.0, banned).logprobs[0]
    np.testing.assert_allclose(out.logprobs.reshape(-1), expected, atol=1e-4)
    assert (out.tokens[:, 0] == out.tokens[:, 1]).all() == (temperature == 0)
    if temperature == 0:
        logits = np.array(hidden @ head)
        logits[:, banned] = -np.inf
        np.testing.assert_array_equal(logits.argmax(-1), out.tokens.reshape(-1))


@functools.lru_cache
def sixteen():
    """16 prompts in one batch, packed tighter as they end and with caches that grow; (completions, programs)."""
    packing = sampler(chunk=6, slots=8, compact=True)
    out = sample(prompts(), of=packing, call=dict(branches=3, max_new_tokens=LIMITS), **ENDING)
    assert out.lengths.min() < 4 and out.lengths.max() == 24 and "stop" in sum(out.finish_reason, ())
    return out, packing.compiles


def test_a_prompt_alone_gives_what_it_gives_among_fifteen_others():
    together = sixteen()[0]
    for i, seed in ((0, 0), (5, 0), (15, 0), (15, 1)):
        call = dict(branches=3, max_new_tokens=24, seed=seed)
        alone, limit = sample(row(prompts(), i), ids=[100 + i], call=call, **ENDING), LIMITS[i, 0]
        assert np.array_equal(alone.tokens[0, :, :limit], together.tokens[i, :, :limit]) == (seed == 0)
        if seed == 0:
            np.testing.assert_allclose(alone.logprobs[0, :, :limit], together.logprobs[i, :, :limit], atol=1e-4)


def test_eight_devices_give_the_same():
    mesh = make_mesh(dict(data=8))
    packing = sampler(mesh=mesh, chunk=12, compact=True)
    out = sample(prompts(), mesh=mesh, of=packing, call=dict(branches=3, max_new_tokens=LIMITS), **ENDING)
    same(out, sixteen()[0])
    assert out.statistics.compactions >= 1


def test_layers_apart_give_the_same():
    packing = sampler(chunk=6, slots=8, compact=True, form="apart")
    out = sample(prompts(), of=packing, call=dict(branches=3, max_new_tokens=LIMITS), **ENDING)
    same(out, sixteen()[0])
    assert out.statistics.compactions >= 2  # rows and branches were taken from caches of one array a layer


@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_split_heads_and_rows_that_do_not_divide_the_devices(form):
    mesh, last = make_mesh(dict(data=4, tensor=2)), slice(13, 16)
    few = jax.tree.map(lambda x: x[:, last] if x.ndim == 3 else x[last], prompts())
    how = dict(mesh=mesh, of=sampler(mesh=mesh, form=form), call=dict(branches=3, max_new_tokens=LIMITS[last]))
    out = sample(few, ids=range(113, 116), **how, **ENDING)
    np.testing.assert_array_equal(out.tokens, sixteen()[0].tokens[last, :, : out.tokens.shape[2]])


def test_chunks_and_packing_change_nothing_but_the_cost():
    call = dict(branches=3, max_new_tokens=LIMITS)
    plain = sample(prompts(), call=call, **ENDING)
    same(plain, sixteen()[0])
    packed, whole = sixteen()[0].statistics, plain.statistics
    assert packed.compactions >= 2 and whole.compactions == 0
    assert packed.steps == whole.steps == 23 and [n for n, _ in packed.chunks] == [6, 6, 6, 5]
    assert whole.branch_steps == 23 * 16 * 3
    assert whole.wasted_branch_steps == whole.branch_steps - (plain.lengths - 1).sum()
    assert packed.wasted_branch_steps < 0.6 * whole.wasted_branch_steps
    # A program for prefill, for the empty caches, and at most for each packing: prompts, branches, decode steps.
    assert sixteen()[1] <= 3 + 3 * packed.compactions
    compiles = sampler().compiles
    sample(prompts(), call=call | dict(seed=9), **ENDING)
    assert sampler().compiles == compiles


def test_banned_tokens_are_never_drawn():
    """The head is changed so that one of two tokens is always by far the likeliest."""
    loud = nnx.merge(*nnx.split(model("qwen2_5_vl")))
    column = 1000 * loud.lm_head.kernel[...][:, 7]
    loud.lm_head.kernel[...] = loud.lm_head.kernel[...].at[:, 7].set(column).at[:, 8].set(-column)
    weights = (nnx.state(loud),)
    how = dict(name="qwen2_5_vl", weights=weights, call=dict(branches=3), temperature=1.0)
    assert np.isin(sample(prompts(4), **how).tokens, (7, 8)).mean() > 0.9
    out = sample(prompts(4), **how, banned_ids=(7, 8))
    assert not np.isin(out.tokens, (7, 8)).any() and (out.logprobs > -100).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_follow_the_softmax(temperature):
    one, n, banned = row(prompts(), 3), 20000, (5,)
    out = sample(one, call=dict(branches=n, max_new_tokens=1), temperature=temperature, banned_ids=banned)
    with jax.default_matmul_precision("highest"):
        logits = np.array(model().logits(teacher_forced("qwen3_vl", one, out.tokens[:, :1]))[0, 0, 0], np.float64)
    logits[list(banned)] = -np.inf
    expected = n * np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    counts = np.bincount(out.tokens.reshape(-1), minlength=len(expected))
    rare = expected < 10  # pooled: the statistic needs cells that are not nearly empty
    cells = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    assert len(cells[0]) > 20 and stats.chisquare(*cells).pvalue > 1e-3
    assert out.statistics.steps == 0 and set(out.finish_reason[0]) == {"length"}


def test_ends():
    greedy = sample(prompts(), call=dict(branches=1)).tokens[:, 0]
    ends = tuple(int(t) for t in np.unique(greedy[:, 0]))
    out = sample(prompts(), eos_ids=ends, pad_id=7)
    assert (out.lengths == 1).all() and out.statistics.steps == 0 and set(out.finish_reason) == {("stop",)}
    assert (out.tokens[:, 0, 0] == greedy[:, 0]).all() and (out.tokens[:, 0, 1:] == 7).all()
    assert out.texts(str) == [["[]"]] * 16
    stop = f"{greedy[0, 2]}, {greedy[0, 3]}"  # spans two tokens
    limits = np.full((16, 1), 12)
    limits[1], limits[2] = 1, 5
    out = sample(prompts(), call=dict(max_new_tokens=limits, detokenize=lambda ids: str(list(ids))), stop=(stop,))
    assert out.finish_reason[:3] == (("stop_string",), ("length",), ("length",))
    assert out.lengths[:3, 0].tolist() == [4, 1, 5]
    np.testing.assert_array_equal(out.tokens[0, 0], [*greedy[0, :4], *[0] * 8])
    np.testing.assert_array_equal(out.tokens[2, 0, :5], greedy[2, :5])
    assert (out.logprobs[0, 0, 4:] == 0).all() and (out.logprobs[0, 0, :4] < 0).all()


@pytest.mark.parametrize(
    ("call", "ids", "message"),
    [
        (dict(branches=0), [1], "at least one prompt and one branch"),
        (dict(max_new_tokens=0), [1], "max_new_tokens must be at least 1"),
        ({}, [1, 2], "2 prompt ids for 1 prompts"),
        ({}, [-1], r"in \[0, 2\^32\)"),
    ],
)
def test_arguments_are_checked(call, ids, message):
    with pytest.raises(ValueError, match=message):
        sample(row(prompts(), 0), ids=ids, call=call)


def test_samplers_are_checked():
    with pytest.raises(ValueError, match="fsdp = 4 gathers all weights"):
        Sampler(None, make_mesh(dict(data=2, fsdp=4)))
    with pytest.raises(ValueError, match="at least one step"):
        Sampler(None, chunk=0)


def test_caches_that_grow_or_lose_branches_stay_on_their_devices():
    """Only where rows move does a device get what another one had."""
    mesh = make_mesh(dict(data=8))
    packing = sampler(mesh=mesh, chunk=12, compact=True)
    cache = KVCache(*[np.zeros((2, 8, 4, 2, 16, 8), np.float32)] * 2)
    cache = jax.device_put(cache, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"))))
    rows, columns = np.arange(8, dtype=np.int32)[::-1].copy(), np.tile(np.array([3, 1], np.int32), (8, 1))

    def exchanges(*program, **named):
        text = packing.lower(*program, **named).compile().as_text()
        return any(f" {name}" in text for name in ("all-gather", "all-reduce", "collective-permute"))

    assert not exchanges("grow_branches", cache, width=4, slots=32)
    for moved, exchanged in ((None, False), (rows, True)):
        moved, kept = jax.device_put((moved, columns), NamedSharding(mesh, PartitionSpec()))
        assert exchanges("take_branches", cache, moved, kept) == exchanged
