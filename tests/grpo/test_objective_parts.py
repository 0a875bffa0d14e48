"""Losses and gradients of micro-batches and of eight devices are those of the whole step."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mllm4d_jax.grpo.batch import RolloutBatch, add_means, denominators
from mllm4d_jax.grpo.objective import objective, prepare
from mllm4d_jax.grpo.presets import PRESETS
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.rules import batch_sharding, replicated
from tests.grpo.objective_cases import make_fields
from tests.grpo.test_objective import assert_close, config_of, prepared
from tests.grpo.test_objective import value_and_gradient as uncompiled

value_and_gradient = jax.jit(uncompiled, static_argnames="config")


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("case", PRESETS)
def test_micro_batches_add_up(case, count):
    batch, logprobs, totals, _ = prepared(case)
    config, size = config_of(case), len(logprobs) // count
    slices = [slice(i * size, (i + 1) * size) for i in range(count)]
    (_, metrics), whole = value_and_gradient(logprobs, batch, totals, config)
    parts = [
        value_and_gradient(logprobs[rows], jax.tree.map(lambda x, rows=rows: x[rows], batch), totals, config)
        for rows in slices
    ]
    gradient = np.concatenate([g for _, g in parts])
    assert_close(sum(float(loss) for (loss, _), _ in parts), gradient, case)
    np.testing.assert_array_equal(gradient, whole)
    summed = add_means(*(m for (_, m), _ in parts))
    for name, mean in metrics.items():
        np.testing.assert_allclose(summed[name].total, mean.total, rtol=1e-6, atol=1e-7)
        assert float(summed[name].weight) == float(mean.weight)


@pytest.mark.parametrize("case", PRESETS)
def test_eight_devices(case):
    """Rows split over the devices, groups torn: preparing included, in one compiled step."""
    fields, logprobs = make_fields(case)
    config, mesh = config_of(case), make_mesh({"data": 8})
    fields = {k: jax.device_put(v, batch_sharding(mesh, v.ndim)) for k, v in fields.items()}
    logprobs = jax.device_put(logprobs, batch_sharding(mesh, 2))

    def step(logprobs, batch):
        batch, _ = prepare(batch, config)
        return jax.value_and_grad(objective, has_aux=True)(logprobs, batch, denominators(batch.mask), config)

    out = ((replicated(mesh), None), batch_sharding(mesh, 2))
    (loss, _), gradient = jax.jit(step, out_shardings=out)(logprobs, RolloutBatch(**fields))
    assert len(gradient.addressable_shards) == 8 and gradient.addressable_shards[0].data.shape[0] == 2
    assert_close(loss, gradient, case)
