"""Learning rates, optimiser and the split of the model."""

from __future__ import annotations

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.split import TrainableError, attach_lora, merge_model, split_model, trained
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.run.optimizer import (
    Sums,
    apply_sums,
    init_optimizer,
    learning_rates,
    make_optimizer,
    optimizer_placement,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def test_cosine_schedule_by_hand():
    rates = learning_rates(2.0, 10, 0.15, "cosine")  # two steps of warm-up
    want = [0.0, 1.0] + [1 + math.cos(math.pi * k / 8) for k in range(8)]
    np.testing.assert_allclose(rates, want, rtol=1e-6)
    assert rates.dtype == np.float32
    assert learning_rates(2.0, 4, 0.0, "cosine")[0] == 2.0
    np.testing.assert_allclose(learning_rates(3.0, 4, 0.5, "constant"), [0, 1.5, 3, 3])
    with pytest.raises(ValueError, match="linear"):
        learning_rates(1.0, 4, 0.0, "linear")


def test_optimizer_is_adamw_on_clipped_gradients():
    """Three steps against the published update rule in float64."""
    rates = np.array([0.1, 0.05, 0.02], np.float32)
    b1, b2, eps, decay, clip = 0.9, 0.95, 1e-6, 0.3, 1.5
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    grads = [{k: rng.normal(size=v.shape) * scale for k, v in params.items()} for scale in (3.0, 0.1, 1.0)]
    optimizer = make_optimizer(rates, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip_norm=clip)
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(ours)
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t, grad in enumerate(grads, 1):
        updates, state = optimizer.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grad), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        norm = math.sqrt(sum((g**2).sum() for g in grad.values()))
        for k in params:
            g = grad[k] * min(1.0, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            step = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps) + decay * params[k]
            params[k] = params[k] - float(rates[t - 1]) * step
    for k in params:
        np.testing.assert_allclose(ours[k], params[k], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_schedule_is_that_of_the_steps_after_one_that_rests(name):
    """Beside the same updates in a row at the rates of steps 0 and 2; moments and their counts do not notice the rest.

    Not finite is no rest: what is left then is the state before that step.
    """
    rates = np.array([0.1, 0.7, 0.02], np.float32)
    how = dict(b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.0, clip_norm=1e9, name=name)
    start, grads = {"w": jnp.ones((3, 2)), "bias": jnp.ones(2)}, {"w": jnp.full((3, 2), 0.5), "bias": jnp.ones(2)}

    def after(rates, weights):
        optimizer = make_optimizer(rates, **how)
        trees = start, optimizer.init(start)
        for weight in weights:
            sums = Sums({part: g * weight for part, g in grads.items()}, *jnp.array([weight, weight, weight]))
            *trees, _ = apply_sums(optimizer, *trees, sums)
        return trees

    found, wanted = after(rates, (1.0, 0.0, 1.0)), after(rates[[0, 2]], (1.0, 1.0))
    jax.tree.map(np.testing.assert_array_equal, found[0], wanted[0])
    before, left = after(rates, (1.0,)), after(rates, (1.0, math.nan))
    jax.tree.map(np.testing.assert_array_equal, before, left)


def test_moments_live_where_their_parameters_live():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    lora = {"a": jax.device_put(jnp.ones((8, 2)), sharding)}
    optimizer = make_optimizer(np.ones(3), b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    state = init_optimizer(optimizer, lora, mesh)
    leaves = jax.tree.leaves(state)
    assert [x.sharding.spec for x in leaves if x.shape == (8, 2)] == [PartitionSpec("fsdp")] * 2
    assert all(x.sharding.is_fully_replicated for x in leaves if x.shape == ())


def test_split_takes_the_adapter_and_only_the_adapter():
    class Model(nnx.Module):
        def __init__(self):
            self.base = nnx.Param(jnp.arange(3.0))
            self.lora_a = nnx.LoRAParam(jnp.ones(2))

    graphdef, lora, frozen = split_model(Model())
    assert jax.tree.map(jnp.shape, lora) == {"lora_a": (2,)}
    assert jax.tree.map(jnp.shape, frozen) == {"base": (3,)}
    merged = nnx.merge(graphdef, jax.tree.map(lambda x: 5 * x, lora), frozen)
    np.testing.assert_array_equal(merged.lora_a[...], [5, 5])
    np.testing.assert_array_equal(merged.base[...], [0, 1, 2])
    with pytest.raises(ValueError, match="'lora' matches no parameter of the model: attach an adapter"):
        split_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_the_last_pattern_that_matches_decides():
    name = "text/stacks/0/attn/q_proj/kernel"
    assert not trained(name, ["lora"]) and trained("text/stacks/0/attn/q_proj/lora_a", ["lora"])
    assert trained(name, ["full"]) and trained("lm_head/kernel", ["full"])
    assert not trained("vision/merger/norm/scale", ["full"]) and not trained(name, ["text"])  # the whole name matches
    assert not trained(name, ["text/.*", "!.*/attn/.*"]) and trained(name, ["!.*/attn/.*", "text/.*"])
    assert not trained("text/stacks/0/attn/q_proj/lora_a", ["full", "!lora"])


def names(tree) -> set[str]:
    return {"/".join(str(key.key) for key in path) for path, _ in jax.tree.leaves_with_path(tree)}


def test_patterns_choose_what_is_trained():
    model = load_model(GOLDEN / "qwen2_5_vl")
    everything = names(split_model(model, ("text/.*", "lm_head/.*", "vision/.*"))[1])
    graphdef, ours, frozen = split_model(model, "full")
    assert names(ours) == {n for n in everything if not n.startswith("vision/")}
    assert names(frozen) == {n for n in everything if n.startswith("vision/")}
    attach_lora(model, rank=2, alpha=2.0, rngs=nnx.Rngs(0))
    _, ours, _ = split_model(model, ("lora", "vision/merger/.*", "!.*/bias"))
    assert {n.rsplit("/", 1)[-1] for n in names(ours) if n.startswith("text/")} == {"lora_a", "lora_b"}
    merger = {n for n in everything if n.startswith("vision/merger/")}
    assert {n for n in names(ours) if n.startswith("vision/")} == {n for n in merger if not n.endswith("bias")} < merger


def test_trained_weights_are_float32_and_round_only_in_the_model():
    model = load_model(GOLDEN / "qwen2_5_vl", dtype=jnp.bfloat16)
    attach_lora(model, rank=2, alpha=2.0, rngs=nnx.Rngs(0))
    graphdef, ours, frozen = split_model(model, ("text/embed", "lora"))
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    small = np.float32(2**-12)  # lost when added to a bfloat16 weight of any size that matters
    moved = jax.tree.map(lambda x: x + small, ours)
    merged = merge_model(graphdef, moved, frozen)
    assert merged.text.embed.dtype == jnp.bfloat16 and merged.text.stacks[0].attn.q_proj.lora_a.dtype == jnp.float32
    np.testing.assert_array_equal(merged.text.embed[...], moved["text"]["embed"].astype(jnp.bfloat16))
    grads = jax.grad(lambda t: merge_model(graphdef, t, frozen).text.embed[...].astype(jnp.float32).sum())(ours)
    assert grads["text"]["embed"].dtype == jnp.float32 and (grads["text"]["embed"] == 1).all()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("lora",), "'lora' matches no parameter of the model: attach an adapter"),
        (("text/.*", "lm_hat/.*"), "'lm_hat/.\\*' matches no parameter of the model .names are like 'lm_head/kernel'"),
        (("text/(",), "not a regular expression"),
        (("text/.*", "!text/.*"), "leaves nothing to train"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(patterns, message):
    with pytest.raises(TrainableError, match=message):
        split_model(load_model(GOLDEN / "qwen2_5_vl"), patterns)


def test_shapes_can_be_split_and_placed_without_arrays():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    shape = {"a": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding)}
    optimizer = make_optimizer(np.ones(3), b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    real = init_optimizer(optimizer, {"a": jax.device_put(jnp.ones((8, 2)), sharding)}, mesh)
    placed = jax.tree.leaves(optimizer_placement(optimizer, shape, mesh))
    assert [x.sharding for x in jax.tree.leaves(real)] == placed
