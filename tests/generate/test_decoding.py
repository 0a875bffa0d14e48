"""One token per branch over a shared prompt cache, against full passes over every branch as a row of its own."""

from __future__ import annotations

import functools
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.generate.decoding import Asked, branch_attention, decode, empty_branches, prefill, prefill_rows
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.text import DecoderOutput, KVCache
from mllm4d_jax.rows.batch import ModelInputs, RowLayout
from mllm4d_jax.verify.reference import build_case, read_arrays

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BRANCHES, STEPS = 3, 5


@functools.lru_cache
def setting(name):
    """(model, prompts with images and videos, random tokens [B, G, N] to feed)."""
    model = load_model(GOLDEN / name, dtype=jnp.float32, attention="xla")
    inputs = build_case("batch", read_arrays(GOLDEN / name / "batch.npz"), model.config, "release").inputs
    shape = (len(inputs.tokens), BRANCHES, STEPS)
    return model, inputs, np.random.default_rng(0).integers(1, 300, shape).astype(np.int32)


@functools.lru_cache
def decoder(name):
    model, inputs, _ = setting(name)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(tokens):
        model = nnx.merge(graphdef, state)
        prompt = prefill(model, inputs)
        own = empty_branches(model, *tokens.shape)
        out = [jnp.broadcast_to(prompt.hidden[:, None], (*tokens.shape[:2], prompt.hidden.shape[-1]))]
        for i in range(tokens.shape[2]):
            positions = jnp.broadcast_to(prompt.next_position[:, None] + i, tokens.shape[:2])
            slots = jnp.full(positions.shape, i)
            hidden, own = decode(model, tokens[..., i], positions, prompt.cache, own, slots)
            out.append(hidden)
        return jnp.stack(out, 2)  # [B, G, N + 1, H]

    def call(tokens):
        with jax.default_matmul_precision("highest"):
            return np.asarray(run(tokens))

    return call


def full_pass(name):
    """Hidden states [B, G, N + 1, H] from rows that repeat the prompt in front of every branch."""
    model, inputs, tokens = setting(name)
    b, p = inputs.tokens.shape
    rows = np.repeat(np.arange(b), BRANCHES)
    after = inputs.positions.max((0, 2))[rows, None] + 1 + np.arange(STEPS)
    full = inputs._replace(
        tokens=np.concatenate([inputs.tokens[rows], tokens.reshape(-1, STEPS)], 1),
        positions=np.concatenate([inputs.positions[:, rows], np.broadcast_to(after, (3, *after.shape))], 2),
        segment_ids=np.pad(inputs.segment_ids[rows], ((0, 0), (0, STEPS)), constant_values=1),
        vision_index=np.pad(inputs.vision_index[rows], ((0, 0), (0, STEPS)), constant_values=-1),
    )
    with jax.default_matmul_precision("highest"):
        hidden = np.asarray(nnx.jit(lambda m, x: m(x))(model, jax.tree.map(jnp.asarray, full)))
    last = [np.flatnonzero(s)[-1] for s in inputs.segment_ids]
    places = np.concatenate([np.array(last)[rows, None], np.broadcast_to(p + np.arange(STEPS), after.shape)], 1)
    return np.take_along_axis(hidden, places[..., None], 1).reshape(b, BRANCHES, STEPS + 1, -1)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_equals_full_passes(name):
    np.testing.assert_allclose(decoder(name)(setting(name)[2]), full_pass(name), atol=5e-5)


def test_new_tokens_follow_the_last_one_of_the_prompt():
    """Not the largest position: a Qwen2.5-VL clip may reach further in time (T, here 40) than the text after it."""
    tokens = np.zeros((2, 8), np.int32)
    seen = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
    positions = np.where(seen, np.arange(8), 0)[None].repeat(3, 0)
    positions[0, 0, 1] = positions[0, 1, 3] = 40
    made = DecoderOutput(jnp.zeros((2, 8, 1)), KVCache(*(jnp.zeros((1, 2, 1, 8, 1)),) * 2), None, {})
    model = SimpleNamespace(forward=lambda *_, **__: made, mesh=None)
    inputs = ModelInputs(tokens, positions, seen, tokens - 1, None)
    assert prefill(model, inputs).next_position.tolist() == [5, 8]
    # A prefix of 4, then two branch slots of 2; the second row has one token in its first branch and no other.
    rows = inputs._replace(segment_ids=np.array([[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0]]), layout=RowLayout(4, 2, 2))
    rows.positions[:, :, 4:] = [[5, 6, 5, 6], [7, 0, 0, 0]]
    following = prefill_rows(model, rows).next_position
    assert following[0].tolist() == [7, 7] and following[1, 0] == 8


def test_branches_do_not_see_each_other():
    tokens = setting("qwen3_vl")[2]
    changed = tokens.copy()
    changed[0, 1] = (changed[0, 1] + 7) % 300
    before, after = decoder("qwen3_vl")(tokens), decoder("qwen3_vl")(changed)
    others = np.ones(tokens.shape[:2], bool)
    others[0, 1] = False
    np.testing.assert_array_equal(before[others], after[others])
    assert np.abs(before - after)[0, 1, 1:].max() > 0.01


@pytest.mark.parametrize("asked", [False, True])
def test_attention_against_float64(asked):
    """`asked`: 0 to 2 of the first 3 places of a branch's cache hold tokens, new ones begin after these places."""
    rng = np.random.default_rng(1)
    b, g, n, k, p, t, d = 2, 3, 4, 2, 7, 5, 8
    lengths, slots = np.array([[0, 1, 2], [2, 0, 1]]), np.array([[3, 4, 3], [4, 3, 3]]) - (0 if asked else [3, 1, 0])
    q, pk, pv, ok, ov = (rng.normal(size=s) for s in ((b, g, n, d), *[(b, k, p, d)] * 2, *[(b, k, g, t, d)] * 2))
    visible = rng.random((b, p)) < 0.6
    cast = functools.partial(jnp.asarray, dtype=jnp.float32)
    began = Asked(jnp.asarray(lengths), jnp.full((b, g), 3)) if asked else None
    own = KVCache(cast(ok), cast(ov))
    found = branch_attention(cast(q), KVCache(cast(pk), cast(pv)), visible, own, jnp.asarray(slots), began)
    for i, j, h in np.ndindex(b, g, n):
        kv, last = h // (n // k), int(slots[i, j]) + 1
        seen = [*range(lengths[i, j]), *range(3, last)] if asked else list(range(last))
        keys = np.concatenate([pk[i, kv][visible[i]], ok[i, kv, j, seen]])
        values = np.concatenate([pv[i, kv][visible[i]], ov[i, kv, j, seen]])
        weights = np.exp(keys @ q[i, j, h] * d**-0.5)
        np.testing.assert_allclose(found[i, j, h], weights @ values / weights.sum(), atol=2e-6)
