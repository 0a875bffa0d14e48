"""Muon: against its published rule in float64, against optax's own, where its state lies, and a run that goes on."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.run.checkpoint import Checkpoints, Meta
from mllm4d_jax.run.optimizer import MUON_BETA, MUON_STEPS, init_optimizer, make_optimizer, optimizer_placement

SETTINGS = dict(b1=0.9, b2=0.98, eps=1e-8, clip_norm=1e9, name="muon")


def tree(rng, dtype=np.float64):
    """Parameters of every kind: stacked matrices, an adapter, experts, vectors and tables."""
    shapes = {
        "text": {
            "embed": (7, 6),
            "stacks": {0: {"q_proj": {"kernel": (2, 6, 4), "bias": (2, 4), "lora_a": (2, 6, 3), "lora_b": (2, 3, 4)}}},
            "norm": {"scale": (6,)},
        },
        "lm_head": {"kernel": (6, 7)},
        "vision": {"patch_embed": {"kernel": (5, 6), "bias": (6,)}, "pos_embed": (4, 6)},
        "experts": {"gate_up": (3, 6, 8), "down": (3, 4, 6), "router": (6, 3)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: rng.normal(size=s).astype(dtype), shapes, is_leaf=is_shape)


MATRICES = {"kernel", "lora_a", "lora_b", "gate_up", "down", "router"}


def is_matrix(path) -> bool:
    names = [key.key for key in path]
    return names[-1] in MATRICES and "lm_head" not in names


def orthogonalised(g: np.ndarray) -> np.ndarray:
    """Newton-Schulz by singular values: each is divided by their root of squares, then put through the polynomial."""
    u, s, v = np.linalg.svd(g, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(MUON_STEPS):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


def test_matrices_move_by_their_orthogonalised_momentum_and_the_rest_by_adam():
    """Three steps in float64; Nesterov momentum with both biases corrected, as optax has it."""
    rates, decay = np.array([0.1, 0.05, 0.02], np.float32), 0.3
    rng = np.random.default_rng(0)
    params, grads = tree(rng), [tree(rng) for _ in rates]
    optimizer = make_optimizer(rates, weight_decay=decay, **SETTINGS)
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(ours)
    step = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = step(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grad), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)

    def reference(path, value, *grads):
        m, v, beta = np.zeros_like(value), np.zeros_like(value), MUON_BETA if is_matrix(path) else SETTINGS["b1"]
        for t, (rate, g) in enumerate(zip(rates, grads, strict=True), 1):
            m = beta * m + (1 - beta) * g
            ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            if is_matrix(path):
                fan_in, fan_out = value.shape[-2:]
                rows = [orthogonalised(a) for a in ahead.reshape(-1, fan_in, fan_out)]
                move = np.reshape(rows, value.shape) * math.sqrt(max(1, fan_out / fan_in)) + decay * value
            else:
                v = SETTINGS["b2"] * v + (1 - SETTINGS["b2"]) * g**2
                move = ahead / (np.sqrt(v / (1 - SETTINGS["b2"] ** t)) + SETTINGS["eps"])
            value = value - float(rate) * move
        return value

    wanted = jax.tree.map_with_path(reference, params, *grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, wanted)


def test_a_plain_matrix_moves_as_with_optax_alone():
    rng = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)}
    grads = {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)}
    ours, theirs = (
        make_optimizer(np.full(2, 0.1), weight_decay=0.2, **SETTINGS),
        optax.contrib.muon(0.1, ns_steps=MUON_STEPS, weight_decay=0.2),
    )
    moves = [o.update(grads, o.init(params), params)[0]["kernel"] for o in (ours, theirs)]
    np.testing.assert_allclose(*moves, rtol=1e-6)


def test_its_momentum_lives_where_the_matrix_lives_and_is_counted_once():
    """One moment for a matrix, two for the rest: a plan that adds up the state's bytes counts them rightly."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"q": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(8)}}
    placed = jax.tree.map(lambda x: jax.device_put(x, sharding), params)
    optimizer = make_optimizer(np.ones(3), weight_decay=0.0, **SETTINGS)
    state = init_optimizer(optimizer, placed, mesh)
    of_shape = lambda shape: [x.sharding.spec for x in jax.tree.leaves(state) if x.shape == shape]  # noqa: E731
    assert of_shape((8, 2)) == [PartitionSpec("fsdp")] and of_shape((8,)) == [PartitionSpec("fsdp")] * 2
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state) if x.shape in ((), (3,)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params)
    planned = jax.tree.leaves(optimizer_placement(optimizer, shapes, mesh))
    assert planned == [x.sharding for x in jax.tree.leaves(state)]


def test_sharded_matrices_move_like_whole_ones():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    rng = np.random.default_rng(2)
    params, grads = ({"kernel": rng.normal(size=(2, 8, 4)).astype(np.float32)} for _ in range(2))
    optimizer = make_optimizer(np.ones(3), weight_decay=0.0, **SETTINGS)
    whole = optimizer.update(grads, optimizer.init(jax.tree.map(jnp.asarray, params)), params)[0]
    put = lambda t: jax.device_put(t, NamedSharding(mesh, PartitionSpec(None, "fsdp")))  # noqa: E731
    params, grads = put(params), put(grads)
    split = jax.jit(optimizer.update)(grads, init_optimizer(optimizer, params, mesh), params)[0]
    np.testing.assert_allclose(split["kernel"], whole["kernel"], rtol=1e-4, atol=1e-5)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match="moun.*adamw, muon"):
        make_optimizer(np.ones(1), weight_decay=0.0, **(SETTINGS | {"name": "moun"}))


def test_its_state_is_saved_whole_and_restored_onto_another_mesh(tmp_path):
    """What was masked out of either half of the state stays so, and the next step is the same."""
    meta = Meta(1, 8, 0, {"task": "sft"}, {})
    optimizer = make_optimizer(np.full(9, 0.1), weight_decay=0.0, **SETTINGS)
    params = {"q": {"kernel": np.random.default_rng(3).normal(size=(2, 8, 4)), "scale": np.ones(8)}}

    def begun(mesh, spec):
        place = lambda x: jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, spec))  # noqa: E731
        placed = {
            "q": {"kernel": place(params["q"]["kernel"]), "scale": jnp.asarray(params["q"]["scale"], jnp.float32)}
        }
        placed["q"]["scale"] = jax.device_put(placed["q"]["scale"], NamedSharding(mesh, PartitionSpec()))
        return placed, init_optimizer(optimizer, placed, mesh)

    trained, state = begun(make_mesh({"data": -1}), PartitionSpec())
    step = jax.jit(optimizer.update)
    _, state = step(trained, state, trained)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(trained, state, meta, 1.0)
    there = begun(make_mesh({"data": 2, "fsdp": 4}), PartitionSpec(None, "fsdp"))
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        restored = checkpoints.restore(1, *there)
    assert jax.tree.structure(restored[1]) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves((trained, state)), strict=True):
        np.testing.assert_array_equal(a, b)
    updates = [step(t, s, t)[0] for t, s in ((trained, state), restored)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *updates)
