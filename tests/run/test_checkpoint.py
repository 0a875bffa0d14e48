"""Saving, restoring and refusing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.run.checkpoint import Checkpoints, Meta, ResumeError, check_resumable
from mllm4d_jax.run.optimizer import init_optimizer, make_optimizer

META = Meta(5, 40, 2, {"task": "sft", "optim.lr": 0.1, "lora.targets": ["q", "k"]}, {"data.path": "abc"})


def make_state(mesh, *axes):
    rng = np.random.default_rng(0)
    lora = {"stacks": {0: {"a": rng.normal(size=(2, 8, 4)), "b": rng.normal(size=(2, 4, 8))}}}
    lora = jax.tree.map(
        lambda x: jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, PartitionSpec(*axes))), lora
    )
    optimizer = make_optimizer(np.ones(9), b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    state = init_optimizer(optimizer, lora, mesh)
    _, state = jax.jit(optimizer.update)(lora, state, lora)
    return lora, state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_round_trip_keeps_every_bit_and_the_newest(tmp_path):
    mesh = make_mesh({"data": -1})
    lora, state = make_state(mesh)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 3, 5):
            checkpoints.save(lora, state, Meta(step, *(40, 2), META.config, META.content), 1.0)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() == 5
        assert checkpoints.meta(5) == META
        blank = jax.tree.map(jnp.zeros_like, (lora, state))
        blank = jax.device_put(blank, jax.tree.map(lambda x: x.sharding, (lora, state)))
        assert_same(checkpoints.restore(5, *blank), (lora, state))
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["3", "5"]


def test_what_is_saved_may_be_donated_at_once(tmp_path):
    mesh = make_mesh({"data": -1})
    lora, state = make_state(mesh)
    want = jax.tree.map(np.array, lora)
    overwrite = jax.jit(lambda x: jax.tree.map(lambda v: v * 0 - 7, x), donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(lora, state, META, 1.0)
        gone = overwrite(lora)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        restored, _ = checkpoints.restore(5, gone, state)
    assert_same(restored, want)


def test_restores_onto_another_mesh(tmp_path):
    lora, state = make_state(make_mesh({"data": -1}))
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(lora, state, META, 1.0)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    template = make_state(mesh, None, "fsdp")
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        restored = checkpoints.restore(5, *template)
    assert_same(restored, (lora, state))
    assert restored[0]["stacks"][0]["a"].sharding.spec == PartitionSpec(None, "fsdp")


def test_another_adapter_is_refused(tmp_path):
    lora, state = make_state(make_mesh({"data": -1}))
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(lora, state, META, 1.0)
    names = lora["stacks"][0]
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        for other in ({"a": names["a"]}, {**names, "c": names["a"]}, {**names, "b": names["b"][:, :2]}):
            with pytest.raises(ResumeError, match=r"do not fit the model: stacks\.0\.[bc]: stored"):
                checkpoints.restore(5, {"stacks": {0: other}}, state)


def test_a_different_run_is_refused_by_key():
    config = {
        "task": "sft",
        "optim.lr": 0.1,
        "lora.targets": ["q", "k"],
        "train.log_every": 7,  # free
        "data.path": "/elsewhere/r.json",  # same content
    }
    check_resumable(META, config, {"data.path": "abc"}, "w")
    with pytest.raises(ResumeError) as caught:
        check_resumable(META, config | {"optim.lr": 0.2, "lora.rank": 8}, {"data.path": "xyz"}, "w/checkpoints")
    text = str(caught.value)
    assert "optim.lr: was 0.1, is 0.2" in text and "lora.rank: was '(not there)', is 8" in text
    assert "data.path: the content is not the same" in text and "/elsewhere/r.json" in text
    assert "w/checkpoints" in text and "step 5" in text and "lora.targets" not in text and "log_every" not in text


def test_held_out_records_stay_the_same_while_checkpoints_are_compared_by_them():
    """Their place may change; without `keep_best` they may be replaced, added and left out."""
    config = {"task": "sft", "data.eval_path": "a.json", "data.eval_root": "x", "train.keep_best": 2}
    stored = Meta(5, 40, 2, config, {"data.eval_path": "abc"})
    moved = config | {"data.eval_path": "b.json", "data.eval_root": "y"}
    check_resumable(stored, moved, {"data.eval_path": "abc"}, "w")
    for content in ({"data.eval_path": "xyz"}, {}):
        with pytest.raises(ResumeError, match="data.eval_path: the content is not the same"):
            check_resumable(stored, moved, content, "w")
        check_resumable(stored, moved | {"train.keep_best": 0}, content, "w")
    with pytest.raises(ResumeError, match="data.eval_path"):
        check_resumable(Meta(5, 40, 2, config, {}), moved, {"data.eval_path": "abc"}, "w")
