"""Every form of attention over shared-prefix rows against a dense mask in float64, on one device and on a mesh."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mllm4d_jax.models import attention as attention_module
from mllm4d_jax.models.attention import QUERY_BLOCK, Backend, attention, choose_backend
from mllm4d_jax.models.shared_prefix import row_attention
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.batch import RowLayout

SMALL = RowLayout(prefix=21, slots=6, length=9)


def inputs(layout=SMALL, b=2, n=4, k=2, d=8, seed=0):
    """Random heads and two clips per row: two thirds of the prefix and of the slots for the first, padding here and
    there, and in every other slot a branch of the other clip behind the slot's own.
    """
    rng = np.random.default_rng(seed)
    q, key, v = (rng.normal(size=(b, layout.size, h, d)).astype(np.float32) for h in (n, k, k))
    ids = np.zeros((b, layout.size), np.int32)
    cut, first = 2 * layout.prefix // 3, 2 * layout.slots // 3
    ids[:, :cut], ids[:, cut : layout.prefix - 2] = 1, 2
    for slot in range(layout.slots):
        start = layout.prefix + slot * layout.length
        end, own = start + rng.integers(1, layout.length + 1), 1 if slot < first else 2
        ids[:, start:end] = own
        if slot % 2:
            ids[:, end : start + rng.integers(1, layout.length + 1)] = 3 - own
    ids[-1, layout.prefix + layout.length : layout.prefix + 2 * layout.length] = 0  # an empty slot
    return q, key, v, ids


def reference(q, k, v, ids, layout):
    """Softmax under the whole mask, float64."""
    index = np.arange(layout.size)
    slot = (index - layout.prefix) // layout.length
    seen = (index[None] <= index[:, None]) & ((index[None] < layout.prefix) | (slot[None] == slot[:, None]))
    mask = (ids[:, :, None] == ids[:, None, :]) & seen
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(np.float64) for x in (q, k.repeat(group, 2), v.repeat(group, 2)))
    scores = np.where(mask[:, None], np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def run(backend, layout, q, k, v, ids):
    """(output, gradients of q, k, v) of a loss that looks at real tokens only."""
    real = jnp.asarray(ids > 0)[..., None, None]

    def loss(q, k, v):
        out = row_attention(q, k, v, segment_ids=ids, layout=layout, backend=backend)
        return jnp.sum(jnp.sin(out) * real), out

    with jax.default_matmul_precision("highest"):
        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return np.asarray(out), [np.asarray(g) for g in grads]


def dense_gradients(q, k, v, ids, layout):
    """Gradients of the same loss by a plain dense mask."""
    index = np.arange(layout.size)
    slot = (index - layout.prefix) // layout.length
    seen = (index[None] <= index[:, None]) & ((index[None] < layout.prefix) | (slot[None] == slot[:, None]))
    mask = (ids[:, :, None] == ids[:, None, :]) & seen

    def loss(q, k, v):
        out = attention_module.masked_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        return jnp.sum(jnp.sin(out) * (ids > 0)[..., None, None])

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)


@functools.lru_cache
def expected(layout=SMALL, **kwargs):
    data = inputs(layout, **kwargs)
    return reference(*data, layout), [np.asarray(g) for g in dense_gradients(*data, layout)]


def compare(found, expected, ids, atol):
    np.testing.assert_allclose(found[0][ids > 0], expected[0][ids > 0], atol=atol)
    assert np.isfinite(found[0]).all()
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=atol)


# 4: prefix and slots in parts; 9: one slot; 18: two slots, prefix in two parts; 200: everything at once.
@pytest.mark.parametrize("block", [None, 4, 9, 18, 200])
def test_xla_forms(block):
    data = inputs()
    compare(run(Backend("xla", query_block=block), SMALL, *data), expected(), data[3], 1e-5)


def test_splash():
    data = inputs()
    compare(run(Backend("splash", interpret=True), SMALL, *data), expected(), data[3], 2e-5)


@pytest.mark.parametrize(
    ("axes", "kwargs"),
    [
        (dict(data=2, fsdp=2, tensor=2), dict(b=4)),
        (dict(fsdp=2, tensor=4), dict(b=2)),  # two key heads cannot be split by four
        (dict(fsdp=8), dict(b=2)),  # nor two rows by eight
    ],
)
def test_splash_on_a_mesh(axes, kwargs):
    mesh = make_mesh(axes)
    data = inputs(**kwargs)
    rows = PartitionSpec(("data", "fsdp") if data[0].shape[0] % (mesh.size // mesh.shape["tensor"]) == 0 else None)
    placed = [jax.device_put(x, NamedSharding(mesh, rows)) for x in data]
    found = run(Backend("splash", mesh, interpret=True), SMALL, *placed)
    compare(found, expected(**kwargs), data[3], 2e-5)


def test_splash_of_frames_on_a_mesh():
    """The vision tower's call: no layout, not causal, frames split over all row axes."""
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    q, k, v, _ = inputs(b=4)
    ids = np.repeat([[1, 2, 0]], 4, 0).repeat([40, 20, SMALL.size - 60], 1).astype(np.int32)
    call = functools.partial(attention, q, k, v, segments=ids, causal=False)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(
            jax.jit(lambda: call(backend=Backend("splash", mesh, interpret=True)))(),
            call(backend=Backend("xla")),
            atol=2e-5,
        )


def test_splash_mask_skips_blocks_and_is_equal_by_value():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    from mllm4d_jax.models.splash import SharedPrefixMask, masks

    layout = RowLayout(prefix=256, slots=6, length=128)
    mask = SharedPrefixMask(1024, layout)
    assert mask == SharedPrefixMask(1024, RowLayout(256, 6, 128)) and hash(mask) == hash(SharedPrefixMask(1024, layout))
    assert mask != SharedPrefixMask(1024, RowLayout(128, 6, 128)) and mask != masks.CausalMask((1024, 1024))
    blocks, function = info.process_mask(masks.MultiHeadMask([mask]), (128, 128))
    # Prefix: 3 of 4 blocks; each of 6 slots: 2 prefix blocks and its own. Nothing is stored as an array.
    assert np.count_nonzero(blocks.block_mask) == 3 + 6 * 3
    assert function is not None and blocks.partial_mask_blocks is None


def sizes(jaxpr):
    """Elements of every array that a program makes, loop bodies included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_blocks_bound_every_array():
    layout = RowLayout(prefix=256, slots=16, length=32)
    data = inputs(layout, b=1, n=2, k=1)

    def largest(block):
        def loss(q, k, v):
            how = dict(segment_ids=data[3], layout=layout, backend=Backend("xla", query_block=block))
            return jnp.sum(row_attention(q, k, v, **how))

        return max(sizes(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*data[:3]).jaxpr))

    assert largest(None) >= 2 * layout.slots * layout.length * layout.prefix
    assert largest(32) <= max(2 * 32 * (layout.prefix + layout.length), data[0].size)


@pytest.mark.parametrize(
    ("platform", "dtype", "capability", "name", "block"),
    [
        ("tpu", jnp.bfloat16, 0.0, "splash", QUERY_BLOCK),
        ("gpu", jnp.bfloat16, 9.0, "cudnn", QUERY_BLOCK),
        ("gpu", jnp.float32, 9.0, "xla", QUERY_BLOCK),
        ("gpu", jnp.bfloat16, 7.0, "xla", QUERY_BLOCK),
        ("cpu", jnp.bfloat16, 0.0, "xla", None),
    ],
)
def test_choice_follows_the_devices_of_the_mesh(monkeypatch, platform, dtype, capability, name, block):
    monkeypatch.setattr(attention_module, "_compute_capability", lambda device: capability)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    backend = choose_backend("auto", dtype, mesh)
    assert (backend.name, backend.query_block, backend.mesh) == (name, block, mesh)
    assert backend.unroll == (platform == "gpu")
    assert str(backend) == name
    assert choose_backend("auto", jnp.float32) == Backend("xla")
