"""Attention by flash kernels. What is around cuDNN's kernels is checked on a CPU, with kernels written in plain JAX in
their place; that cuDNN's own are called, without masks and S x S products, is read in programs lowered for CUDA.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from configs.published import published_config
from mllm4d_jax.encode.grids import VisionInputs
from mllm4d_jax.models import cudnn
from mllm4d_jax.models.attention import Backend, attention
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.shared_prefix import row_attention
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.batch import ModelInputs, RowLayout
from tests.models import test_splash_rows as rows

LONE = RowLayout(prefix=21, slots=6, length=9, packed=False)
BACKEND = Backend("cudnn")
QUICK = {"xla_backend_optimization_level": 0}  # compiling costs more than running here


def scores(q, k, causal, lengths, mask):
    """f32[B, K, G, S, T] under what the kernels are told, -inf where nothing is seen."""
    b, s, n, d = q.shape
    seen = jnp.ones((b, s, k.shape[1]), bool) if mask is None else mask
    if causal:
        seen &= jnp.tril(jnp.ones(seen.shape[1:], bool))
    if lengths is not None:
        seen &= jnp.arange(k.shape[1]) < lengths[:, None, None]
    grouped = q.reshape(b, s, k.shape[2], -1, d)
    # As a bias does: a query that sees nothing sees everything, far down.
    return jnp.einsum("bskgd,btkd->bkgst", grouped, k) * d**-0.5 + jnp.where(seen, 0, cudnn.HIDDEN)[:, None, None]


def plain_forward(q, k, v, *, causal, lengths=None, mask=None):
    s = scores(q, k, causal, lengths, mask)
    lse = jax.nn.logsumexp(s, -1)
    out = jnp.einsum("bkgst,btkd->bskgd", jnp.exp(s - lse[..., None]), v)
    return out.reshape(q.shape), lse.reshape(len(q), q.shape[2], q.shape[1])


def plain_backward(q, k, v, out, lse, dout, *, causal, lengths=None, mask=None):
    """The backward pass of FlashAttention: it knows the softmax by `lse` and `out` alone."""
    s = scores(q, k, causal, lengths, mask)
    p = jnp.exp(s - lse.reshape(*s.shape[:-1], 1))
    q5, out5, dout5 = (x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]) for x in (q, out, dout))
    dp = jnp.einsum("bskgd,btkd->bkgst", dout5, v)
    ds = p * (dp - jnp.einsum("bskgd,bskgd->bkgs", dout5, out5)[..., None]) * q.shape[3] ** -0.5
    dq = jnp.einsum("bkgst,btkd->bskgd", ds, k).reshape(q.shape)
    return dq, jnp.einsum("bkgst,bskgd->btkd", ds, q5), jnp.einsum("bkgst,bskgd->btkd", p, dout5)


@pytest.fixture
def kernels(monkeypatch):
    """Both kernels in plain JAX; a test may replace either once more."""
    monkeypatch.setattr(cudnn, "forward", plain_forward)
    monkeypatch.setattr(cudnn, "backward", plain_backward)
    return monkeypatch


def lone_inputs(layout=LONE, b=3, n=4, k=2, d=8, seed=0):
    """One clip a row: prefixes of several lengths, an empty slot, a full one, and a last row without anything."""
    q, key, v, _ = rows.inputs(layout, b, n, k, d, seed)
    ids, rng = np.zeros((b, layout.size), np.int32), np.random.default_rng(seed)
    for row in range(b - 1):
        ids[row, : layout.prefix - 5 * row] = 1
        for slot in range(layout.slots):
            length = {1: 0, 2: layout.length}.get(slot, rng.integers(1, layout.length))
            start = layout.prefix + slot * layout.length
            ids[row, start : start + length] = 1
    return q, key, v, ids


def visible(ids, layout):
    """bool[B, S, S] of rows, written out."""
    index = np.arange(layout.size)
    slot = (index - layout.prefix) // max(layout.length, 1)
    seen = (index <= index[:, None]) & ((index < layout.prefix) | (slot == slot[:, None]))
    return seen & (ids[:, :, None] == ids[:, None, :])


def float64(q, k, v, ids, seen):
    """Values, and gradients of the sum of their sines over real tokens, in closed form."""
    b, s, n, d = q.shape
    group = n // k.shape[2]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k.repeat(group, 2), v.repeat(group, 2)))
    scores = np.where(seen[:, None], np.einsum("bsnd,btnd->bnst", q, k) / np.sqrt(d), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bnst,btnd->bsnd", p, v)
    dout = np.cos(out) * (ids > 0)[..., None, None]
    dp = np.einsum("bsnd,btnd->bnst", dout, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(d)
    dk, dv = np.einsum("bnst,bsnd->btnd", ds, q), np.einsum("bnst,bsnd->btnd", p, dout)
    shared = [x.reshape(b, s, -1, group, d).sum(3) for x in (dk, dv)]
    return out, [np.einsum("bnst,btnd->bsnd", ds, k), *shared]


def run(attend, q, k, v, ids):
    """The same by `attend(q, k, v, segments)`."""

    def both(q, k, v, ids):
        out, pull = jax.vjp(lambda *x: attend(*x, ids), q, k, v)
        return out, pull(jnp.cos(out) * (ids > 0)[..., None, None])

    with jax.default_matmul_precision("highest"):
        out, grads = jax.jit(both, compiler_options=QUICK)(q, k, v, ids)
    return np.asarray(out), [np.asarray(g) for g in grads]


def by_rows(layout, backend=BACKEND):
    return lambda q, k, v, ids: row_attention(q, k, v, segment_ids=ids, layout=layout, backend=backend)


@pytest.mark.parametrize(("n", "k", "d"), [(4, 2, 8), (8, 1, 64), (2, 2, 72), (6, 2, 80), (4, 1, 128)], ids=str)
def test_rows_of_one_clip(kernels, n, k, d):
    data = lone_inputs(n=n, k=k, d=d)
    expected = float64(*data, visible(data[3], LONE))
    rows.compare(run(by_rows(LONE), *data), expected, data[3], 2e-5)


@pytest.mark.parametrize(("n", "k", "d"), [(4, 2, 72), (8, 1, 64)])
def test_rows_of_several_clips(kernels, n, k, d):
    data = rows.inputs(n=n, k=k, d=d)
    expected = float64(*data, visible(data[3], rows.SMALL))
    rows.compare(run(by_rows(rows.SMALL), *data), expected, data[3], 2e-5)


def part_lse(q, k, v, out, lse, dout, **sees):
    """A part's own log-sum-exp in place of the merged one."""
    return plain_backward(q, k, v, out, plain_forward(q, k, v, **sees)[1], dout, **sees)


def part_out(q, k, v, out, lse, dout, **sees):
    return plain_backward(q, k, v, plain_forward(q, k, v, **sees)[0], lse, dout, **sees)


def moved(by):
    def forward(q, k, v, *, causal, lengths=None, mask=None):
        if not causal:
            return plain_forward(q, k, v, causal=False, lengths=lengths, mask=mask)
        mask = jnp.ones((q.shape[0], q.shape[1], k.shape[1]), bool) if mask is None else mask
        mask &= jnp.tril(jnp.ones(mask.shape[1:], bool), by)
        return plain_forward(q, k, v, causal=False, mask=mask)

    return forward


def no_lengths(q, k, v, *, causal, lengths=None, mask=None):
    return plain_forward(q, k, v, causal=causal, mask=mask)


def fails(computed=LONE, true=LONE, data=None):
    """Checks that what the kernels give by one layout is told from what another means."""
    data = lone_inputs() if data is None else data
    found, expected = run(by_rows(computed), *data), float64(*data, visible(data[3], true))
    with pytest.raises(AssertionError):
        rows.compare(found, expected, data[3], 1e-3)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("backward", part_lse),
        ("backward", part_out),
        ("forward", moved(1)),
        ("forward", moved(-1)),
        ("forward", no_lengths),
    ],
    ids=["own lse", "own out", "sees the next", "not itself", "sees padding"],
)
def test_faults_of_a_part_are_noticed(kernels, name, fault):
    kernels.setattr(cudnn, name, fault)
    fails()


def test_a_branch_that_sees_its_neighbour_is_noticed(kernels):
    fails(RowLayout(LONE.prefix, LONE.slots // 2, 2 * LONE.length, packed=False))


def test_rows_of_several_clips_need_their_masks(kernels):
    fails(LONE, rows.SMALL, rows.inputs())


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_rows_padded_on_either_side(kernels, side):
    """No mask is made: the kernels hear of causality alone."""

    def maskless(*args, causal, lengths=None, mask=None):
        assert causal and lengths is mask is None
        return plain_forward(*args, causal=True)

    kernels.setattr(cudnn, "forward", maskless)
    q, k, v, _ = rows.inputs(rows.RowLayout(23, 0, 0), b=3)
    ids = np.arange(23) < np.array([[23], [16], [1]])
    ids = np.int32(ids if side == "right" else ids[:, ::-1])
    expected = float64(q, k, v, ids, visible(ids, RowLayout(23, 0, 0)))
    rows.compare(run(by_rows(None), q, k, v, ids), expected, ids, 2e-5)


@pytest.mark.parametrize(("lone", "d"), [(True, 72), (True, 80), (True, 64), (False, 72)])
def test_frames(kernels, lone, d):
    """Frames of several sizes and an empty one, by lengths; windows of a frame, whose places alternate, by a mask."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(3, 22, 2, d)).astype(np.float32) for _ in range(3))
    ids = np.int32(np.arange(22) < np.array([[22], [15], [0]]))
    ids = ids if lone else ids * (1 + np.arange(22, dtype=np.int32) // 2 % 2)

    def attend(q, k, v, ids):
        return attention(q, k, v, segments=ids, causal=False, backend=BACKEND, lone=lone)

    expected = float64(q, k, v, ids, ids[:, :, None] == ids[:, None, :])
    rows.compare(run(attend, q, k, v, ids), expected, ids, 2e-5)


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, tensor=2)], ids=str)
def test_rows_on_a_mesh(kernels, axes):
    """The first mesh splits rows and heads; the second can split neither four ways, and repeats the rows."""
    mesh, data = make_mesh(axes), lone_inputs(b=4 if "data" in axes else 2)
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec())) for x in data]
    expected = float64(*data, visible(data[3], LONE))
    rows.compare(run(by_rows(LONE, Backend("cudnn", mesh)), *placed), expected, data[3], 2e-5)


# --- the programs for a GPU ------------------------------------------------------------------------------------------


def lowered(function, *args) -> str:
    """The program for CUDA, which takes neither a GPU nor NVIDIA's libraries."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> tuple[int, int]:
    """Kernel calls forward and backward."""
    return tuple(len(re.findall(rf"@__cudnn\$fmha\w*{end}\(", text)) for end in ("Softmax", "SoftmaxBackward"))


def squares(text: str, sizes: set[int]) -> list[str]:
    """Shapes of results with two dimensions of these sizes."""
    shapes = set(re.findall(r"tensor<([\dx]+)x(?:bf16|f32|i1)>", text))
    return [s for s in shapes if sum(int(n) in sizes for n in s.split("x")) > 1]


def abstract(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("d", [60, 72])  # 60 is no multiple of 8
@pytest.mark.parametrize("kind", ["one clip", "several clips", "plain", "frames", "windows"])
def test_the_program_calls_the_kernels_and_makes_no_scores(kind, d):
    p, slots, length = 300, 5, 44  # sizes that no other dimension has
    layout = {"one clip": RowLayout(p, slots, length, False), "several clips": RowLayout(p, slots, length)}.get(kind)
    size = layout.size if layout else p

    def loss(q, k, v, ids, backend=BACKEND):
        if kind in ("frames", "windows"):
            out = attention(q, k, v, segments=ids, causal=False, backend=backend, lone=kind == "frames")
        else:
            out = row_attention(q, k, v, segment_ids=ids, layout=layout, backend=backend)
        return out.astype(jnp.float32).sum()

    key = abstract(2, size, 2, d)
    args = abstract(2, size, 4, d), key, key, abstract(2, size, dtype=jnp.int32)
    text = lowered(jax.grad(loss, (0, 1, 2)), *args)
    parts = 3 if layout else 1
    assert calls(text) == (parts, parts)
    assert (squares(text, {p, slots * length, size, length}) == []) == (kind in ("one clip", "plain", "frames"))
    if kind == "one clip":
        xla = lowered(jax.grad(functools.partial(loss, backend=Backend("xla")), (0, 1, 2)), *args)
        assert calls(xla) == (0, 0)
        assert squares(xla, {p, slots * length, size, length})  # the search finds what it looks for


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize(("remat", "forward"), [("none", 3), ("dots", 3), ("dots_except_mlp", 3), ("full", 6)])
def test_what_is_kept_of_attention_is_not_computed_again(remat, forward, unroll):
    """Three kernels forward and three backward, of each of two layers or in the bodies of the two loops over them."""
    model = small_model(remat)
    assert model.backend.unroll
    model.backend = dataclasses.replace(model.backend, unroll=unroll)
    graphdef, state = nnx.split(model)
    layout = RowLayout(32, 2, 8, packed=False)
    ids = abstract(2, layout.size, dtype=jnp.int32)
    inputs = ModelInputs(ids, abstract(3, *ids.shape, dtype=jnp.int32), ids, ids, None, layout)

    def loss(state, inputs):
        return nnx.merge(graphdef, state)(inputs).astype(jnp.float32).sum()

    bodies = 2 if unroll else 1
    assert calls(lowered(jax.grad(loss), state, inputs)) == (forward * bodies, 3 * bodies)


def test_the_tower_of_a_model_calls_one_kernel():
    """Frames that fill their places or not: lengths, and no mask."""
    graphdef, state = nnx.split(small_model("none"))
    shapes = dict(patches=(3, 64, 1536), rowcol=(3, 64, 2), frame_segments=(3, 64), table_index=(3, 64, 4))
    vision = {k: abstract(*shape, dtype=jnp.float32 if k == "patches" else jnp.int32) for k, shape in shapes.items()}
    vision = VisionInputs(**vision, window_segments=None, table_weight=abstract(3, 64, 4, dtype=jnp.float32))
    text = lowered(lambda s, v: nnx.merge(graphdef, s).encode_vision(v), state, vision)
    assert calls(text) == (1, 0) and "x64x64x" not in text


def small_model(remat: str):
    """Shapes of a small Qwen3-VL in bfloat16 that runs on a GPU."""
    raw = published_config("2b")
    raw["text_config"].update(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=56,
    )  # fmt: skip
    raw["text_config"]["rope_scaling"]["mrope_section"] = [4, 2, 2]
    raw["vision_config"].update(
        depth=2, deepstack_visual_indexes=[0], hidden_size=40, intermediate_size=24, num_heads=2, out_hidden_size=48
    )
    config = ModelConfig.from_dict(raw)
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0")

    def make():
        model = QwenVL(config, remat=remat, mesh=SimpleNamespace(devices=np.array([gpu])), rngs=nnx.Rngs(0))
        model.mesh, model.backend = None, dataclasses.replace(model.backend, mesh=None)
        return model

    model = nnx.eval_shape(make)
    assert model.backend.name == "cudnn"
    return model
