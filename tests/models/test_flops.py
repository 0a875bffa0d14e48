"""The analytic FLOP count against the matrix products in the traced program, and the counts of work against masks."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.published import published_config
from mllm4d_jax.encode.grids import VisionInputs
from mllm4d_jax.models import flops
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.rows.batch import ModelInputs, RowLayout

ROWS, FRAMES, PATCHES, SUPERVISED = 2, 4, 16, 24
LAYOUT = RowLayout(24, 3, 8)
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


def small(size: str) -> ModelConfig:
    """A published architecture with everything small but unequal."""
    config = ModelConfig.from_dict(published_config(size))
    v = dataclasses.replace(
        config.vision, depth=3, hidden_size=32, intermediate_size=40, num_heads=2, out_hidden_size=48,
        deepstack=(0, 2) if config.vision.deepstack else (), full_blocks=(1,) if config.vision.window else (),
    )  # fmt: skip
    rope = dataclasses.replace(config.text.rope, sections=(4, 2, 2))
    t = dataclasses.replace(
        config.text, vocab_size=112, hidden_size=48, intermediate_size=56, num_layers=2, num_heads=6,
        num_kv_heads=2, head_dim=16, rope=rope, moe=None,
    )  # fmt: skip
    return dataclasses.replace(config, text=t, vision=v)


def abstract_inputs(config: ModelConfig) -> ModelInputs:
    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    shape, windows, table = (FRAMES, PATCHES), config.vision.window > 0, config.vision.position_side > 0
    vision = VisionInputs(
        patches=floats(*shape, config.vision.patch_dim),
        rowcol=ints(*shape, 2),
        frame_segments=ints(*shape),
        window_segments=ints(*shape) if windows else None,
        table_index=ints(*shape, 4) if table else None,
        table_weight=floats(*shape, 4) if table else None,
    )
    rows = (ROWS, LAYOUT.size)
    return ModelInputs(ints(*rows), ints(3, *rows), ints(*rows), ints(*rows), vision, LAYOUT)


def executed(jaxpr) -> float:
    """FLOPs of every matrix product of a traced program, bodies of scans as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            size = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2.0 * size * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * executed(inner)
    return total


def dense_work(config: ModelConfig) -> flops.Work:
    """What the plain form computes: masked pairs too."""
    work = flops.padded_work(LAYOUT, ROWS, FRAMES, PATCHES, SUPERVISED)
    p, branches = LAYOUT.prefix, LAYOUT.slots * LAYOUT.length
    return dataclasses.replace(work, pairs=ROWS * (p * p + branches * (p + LAYOUT.length)))


def traced(config: ModelConfig, tuning: flops.Tuning, *, gradient: bool) -> float:
    """FLOPs of the program for that tuning."""

    how = dict(remat=tuning.remat, vision_remat=tuning.vision_remat)

    def make() -> QwenVL:
        model = QwenVL(config, dtype=jnp.float32, attention="xla", rngs=nnx.Rngs(0), **how)
        if tuning.rank:
            attach_lora(model, rank=tuning.rank, alpha=8.0, targets=tuning.targets, rngs=nnx.Rngs(0))
        return model

    wanted = [nnx.LoRAParam] if tuning.rank else []
    wanted += [nnx.Any(nnx.PathContains("text"), nnx.PathContains("lm_head"))] if tuning.text else []
    wanted += [nnx.PathContains("vision")] if tuning.vision else []
    graphdef, trained, frozen = nnx.split(nnx.eval_shape(make), nnx.Any(*wanted) if wanted else nnx.LoRAParam, ...)

    def loss(trained, frozen, inputs, rows):
        model = nnx.merge(graphdef, trained, frozen)
        chosen = model(inputs).reshape(-1, config.text.hidden_size)[rows]
        return jax.checkpoint(lambda h: jax.nn.logsumexp(h @ model.head_kernel(), -1).sum())(chosen)

    program = jax.grad(loss) if gradient else loss
    rows = jax.ShapeDtypeStruct((SUPERVISED,), jnp.int32)
    return executed(jax.make_jaxpr(program)(trained, frozen, abstract_inputs(config), rows).jaxpr)


@pytest.mark.parametrize("size", ["8b", "qwen2_5_vl_7b"])
def test_forward_is_every_matrix_product_of_the_program(size):
    config, tuning = small(size), flops.Tuning(rank=4, targets=TARGETS, remat="none")
    counted = flops.step_flops(config, dense_work(config), tuning)
    assert counted.total.forward == traced(config, tuning, gradient=False)
    assert all(getattr(counted, f.name).forward > 0 for f in dataclasses.fields(counted))


@pytest.mark.parametrize("remat", ["none", "full", "dots", "dots_except_mlp"])
def test_gradient_of_adapters_leaves_out_frozen_weights_and_the_tower(remat):
    config, tuning = small("8b"), flops.Tuning(rank=4, targets=TARGETS, remat=remat)
    counted = flops.step_flops(config, dense_work(config), tuning)
    # With "dots" the division that ends branch attention repeats a product the count leaves out.
    tolerance = 0.02 if remat.startswith("dots") else 1e-9
    assert counted.total.hardware == pytest.approx(traced(config, tuning, gradient=True), rel=tolerance)
    assert (counted.decoder.recompute > counted.decoder.forward / 2) == (remat == "full")
    assert (counted.decoder.recompute == 0) == (remat in ("none", "dots"))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradient_of_all_weights(remat):
    config, tuning = small("8b"), flops.Tuning(text=True, vision=True, remat=remat, vision_remat=remat)
    counted = flops.step_flops(config, dense_work(config), tuning).total
    assert counted.hardware == pytest.approx(traced(config, tuning, gradient=True), rel=1e-9)


def test_real_work_counts_visible_pairs():
    layout = RowLayout(8, 3, 4)
    segments = np.zeros((2, layout.size), np.int32)
    segments[0, :7] = [1, 1, 1, 2, 2, 0, 0]
    segments[0, 8:12], segments[0, 12:14], segments[0, 16:19], segments[0, 19] = 1, 2, 1, 2  # two in the last slot
    segments[1, :4], segments[1, 8:9] = 1, 1
    q = np.arange(layout.size)
    slot = np.where(q < layout.prefix, -1, (q - layout.prefix) // layout.length)
    visible = (q[None] <= q[:, None]) & ((q[None] < layout.prefix) | (slot[None] == slot[:, None]))
    expected = sum(int((visible & (s[:, None] == s[None]) & (s[:, None] > 0)).sum()) for s in segments)
    ids = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32)
    windows = np.array([[1, 1, 2, 2], [1, 2, 0, 0]], np.int32)
    vision = VisionInputs(None, None, ids, windows, None, None)
    work = flops.real_work(ModelInputs(segments, None, segments, None, vision, layout), 5)
    assert work == flops.Work(int((segments > 0).sum()), expected, 6, 16 + 4, 4 + 4 + 1 + 1, 5)
    full = np.ones((1, layout.size), np.int32)
    assert flops.real_work(ModelInputs(full, None, full, None, None, layout), 0).pairs == flops.row_pairs(layout)
    assert flops.real_work(ModelInputs(full, None, full, None, None, None), 0).pairs == flops.row_pairs(
        RowLayout(layout.size, 0, 0)
    )


def test_sparse_layers_cost_what_is_routed():
    """30B-A3B: about 3 billion active parameters, so about 6 GFLOP forward a token without attention and head."""
    config = ModelConfig.from_dict(published_config("30b_a3b"))
    counted = flops.step_flops(config, flops.Work(1, 0, 0, 0, 0, 0), flops.Tuning())
    assert 2 * 2.5e9 < counted.decoder.forward < 2 * 3.3e9
    assert counted.total.hardware == counted.decoder.forward  # nothing trained, so no backward
