"""Sparse layer against a loop over tokens in float64, and the balancing loss by its definition."""

from __future__ import annotations

import functools
import inspect
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.models import grouped
from mllm4d_jax.models.attention import Backend
from mllm4d_jax.models.config import MoEConfig
from mllm4d_jax.models.sparse import RouterStats, SparseMLP, load_balancing_loss
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.rules import batch_sharding

XLA = Backend("xla")
grouped_kernels = grouped._kernels


def layer(experts=5, top_k=2, width=8, hidden=6):
    config = MoEConfig(experts, top_k, hidden, (True,))
    module = SparseMLP(width, config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for p in (module.router, module.gate_up, module.down):
        p[...] = jnp.asarray(rng.normal(size=p.shape), jnp.float32)
    return module


def reference(module, x):
    router, gate_up, down = (np.asarray(p[...], np.float64) for p in (module.router, module.gate_up, module.down))
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = token @ router
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        chosen = np.argsort(-probs)[: module.top_k]
        for e in chosen:
            gate, up = np.split(token @ gate_up[e], 2)
            out[t] += probs[e] / probs[chosen].sum() * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    return out


def test_equals_token_loop():
    module = layer()
    x = np.random.default_rng(1).normal(size=(2, 7, 8))
    with jax.default_matmul_precision("highest"):
        y, _, _ = jax.jit(lambda x: module(x, jnp.ones((2, 7), bool), XLA))(x.astype(np.float32))
    np.testing.assert_allclose(np.asarray(y).reshape(14, 8), reference(module, x.reshape(14, 8)), atol=2e-5)


def test_all_tokens_on_one_expert_are_all_served():
    module = layer(top_k=1)
    module.router[...] = jnp.zeros((8, 5)).at[:, 3].set(1.0)
    x = np.abs(np.random.default_rng(2).normal(size=(1, 9, 8)))
    with jax.default_matmul_precision("highest"):
        y, stats, (_, _, chosen) = module(x.astype(np.float32), jnp.ones((1, 9), bool), XLA)
    assert (np.asarray(chosen) == 3).all() and stats.assignments[3] == 9
    np.testing.assert_allclose(y[0], reference(module, x[0]), atol=2e-5)


def test_balancing_loss_ignores_padding_and_is_top_k_when_balanced():
    module = layer()
    x = np.random.default_rng(3).normal(size=(1, 6, 8)).astype(np.float32)
    real = jnp.array([[1, 1, 1, 1, 0, 0]], bool)
    _, stats, _ = module(x, real, XLA)
    _, alone, _ = module(x[:, :4], real[:, :4], XLA)
    for a, b in zip(stats, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert stats.assignments.sum() == 2 * 4
    even = RouterStats(jnp.full((3, 4), 2.0), jnp.full((3, 4), 1.0), jnp.full(3, 4.0))  # 3 layers, 4 experts, top-2
    np.testing.assert_allclose(load_balancing_loss(even), 2.0, rtol=1e-6)


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2), dict(tensor=8)], ids=str)
def test_on_a_mesh_every_device_multiplies_its_own_rows(axes):
    """Values and all gradients are those of one device, and no row is sent to another device to be sorted."""
    mesh, module = make_mesh(axes), layer(experts=6, width=16, hidden=8)
    rng = np.random.default_rng(4)
    x, wanted = rng.normal(size=(2, 8, 5, 16)).astype(np.float32)
    graphdef, state = nnx.split(module)

    def loss(state, x, backend):
        y, stats, _ = nnx.merge(graphdef, state)(x, jnp.ones(x.shape[:2], bool), backend)
        return jnp.sum(y * wanted) + jnp.sum(stats.probabilities**2)

    with jax.default_matmul_precision("highest"):
        expected = jax.value_and_grad(loss, (0, 1))(state, x, XLA)
        placed = jax.device_put(x, batch_sharding(mesh, 3))
        program = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
        found = program(state, placed, Backend("xla", mesh))
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    text = program.lower(state, placed, Backend("xla", mesh)).compile().as_text()
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* all-(?:gather|to-all)", text)
    assert "data" not in axes or not moved, "rows, or what the router says of them"


def lowered(function, *args) -> str:
    """The program for CUDA, which takes neither a GPU nor NVIDIA's libraries."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
def test_the_program_for_hopper_calls_its_kernels(monkeypatch, devices, trained):
    """Two products forward, two backward, and of trained experts two more; the xla form has no kernel, nor few rows."""
    monkeypatch.setattr(grouped, "_kernels", _kernels_of_known_cores)
    mesh = make_mesh(dict(data=devices)) if devices > 1 else None
    config = MoEConfig(4, 2, 128, (True,))
    module = nnx.eval_shape(lambda: SparseMLP(256, config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    x = jax.ShapeDtypeStruct((8, 128, 256), jnp.bfloat16)

    def loss(x, state, form):
        y = nnx.merge(graphdef, state)(x, jnp.ones(x.shape[:2], bool), Backend("xla", mesh, grouped=form))[0]
        return y.astype(jnp.float32).sum()

    calls, few = {}, jax.ShapeDtypeStruct((8, 4, 256), jnp.bfloat16)
    for form in grouped.FORMS:
        gradients = jax.grad(functools.partial(loss, form=form), (0, 1) if trained else 0)
        calls[form] = [lowered(gradients, x, state).count("custom_call @mosaic_gpu") for x in (x, few)]
    assert calls == {"xla": [0, 0], "hopper": [6 if trained else 4, 0]}


def _kernels_of_known_cores():
    """JAX's kernel for the gradient of the matrices asks the first device of this process how many cores it has."""
    product, transposed = grouped_kernels()
    module = inspect.getmodule(transposed)

    def known(*args, **options):
        devices, module.jax.devices = module.jax.devices, lambda: [SimpleNamespace(core_count=132)]
        try:
            return transposed(*args, **options)
        finally:
            module.jax.devices = devices

    return product, known


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "widths", "expected", "warning"),
    [
        ("gpu", "9.0", jnp.bfloat16, (2048, 768), "hopper", None),
        ("gpu", "9.0", jnp.bfloat16, (), "xla", None),  # a dense model
        ("gpu", "9.0", jnp.float32, (2048, 768), "xla", None),
        ("gpu", "9.0", jnp.bfloat16, (2048, 96), "xla", "multiples of 128, and one is 96"),
        ("gpu", "8.0", jnp.bfloat16, (2048, 768), "xla", "compute capability 9, and this one has 8.0"),
        ("gpu", "10.0", jnp.bfloat16, (2048, 768), "xla", "compute capability 9, and this one has 10.0"),
        ("cpu", "", jnp.bfloat16, (2048, 768), "xla", None),
        ("tpu", "", jnp.bfloat16, (2048, 768), "xla", None),
    ],
)
def test_the_form_is_chosen_after_what_can_run(caplog, platform, capability, dtype, widths, expected, warning):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert grouped.choose_form(device, dtype, widths) == expected
    assert [warning in r.getMessage() for r in caplog.records] == ([True] if warning else [])


def test_a_release_of_jax_with_other_kernels_gets_xla_with_a_warning(monkeypatch, caplog):
    def other(lhs, rhs, *, group_sizes, block_m, block_n, block_k, max_concurrent_steps):
        """Lacks two of the names."""

    monkeypatch.setattr(grouped, "_kernels", lambda: (other, other))
    device = SimpleNamespace(platform="gpu", compute_capability="9.0")
    assert grouped.choose_form(device, jnp.bfloat16, (256,)) == "xla"
    assert "offers them in another form, without grid_block_n, transpose_rhs" in caplog.text
