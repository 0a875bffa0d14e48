"""Every objective against the float64 loops of `objective_cases`: value, gradient, metrics, extreme numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm4d_jax.grpo.batch import RolloutBatch, add_means, denominators
from mllm4d_jax.grpo.objective import kl, objective, prepare
from mllm4d_jax.grpo.presets import PRESETS, ObjectiveConfig
from mllm4d_jax.grpo.ratios import truncated_importance
from tests.grpo.objective_cases import (
    CAP,
    PRESET_SPECS,
    SPECS,
    VARIANTS,
    make_fields,
    reference,
    reference_prepared,
    token_advantages,
)


def config_of(case: str) -> ObjectiveConfig:
    if case in PRESET_SPECS:
        return dataclasses.replace(PRESETS[case], max_completion=CAP)
    return ObjectiveConfig(max_completion=CAP, **VARIANTS[case])


def prepared(case: str, seed: int = 0):
    """(prepared batch, log-probs, its denominators, metrics)."""
    fields, logprobs = make_fields(case, seed)
    batch, metrics = prepare(RolloutBatch(**fields), config_of(case))
    if token_advantages(case) is not None:
        batch = batch._replace(advantages=token_advantages(case))
    return batch, logprobs, denominators(batch.mask), metrics


def value_and_gradient(logprobs, batch, totals, config):
    return jax.value_and_grad(objective, has_aux=True)(logprobs, batch, totals, config)


def assert_close(loss, gradient, case, seed=0):
    """To 1e-6 of the largest entry; tokens that do not count get exactly nothing."""
    wanted_loss, wanted = reference(case, seed)
    np.testing.assert_allclose(float(loss), wanted_loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    assert np.array_equal(np.asarray(gradient) == 0, np.abs(wanted) < 1e-8)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", SPECS)
def test_value_and_gradient(case, seed):
    batch, logprobs, totals, _ = prepared(case, seed)
    (loss, _), gradient = value_and_gradient(logprobs, batch, totals, config_of(case))
    assert_close(loss, gradient, case, seed)


@pytest.mark.parametrize("case", SPECS)
def test_the_cases_reach_every_branch(case):
    """A comparison on data that nothing clips would prove little."""
    found = []
    for seed in (0, 1):
        batch, logprobs, totals, _ = prepared(case, seed)
        (_, metrics), gradient = value_and_gradient(logprobs, batch, totals, config_of(case))
        assert np.count_nonzero(gradient) > 10
        found.append(metrics)
    metrics = add_means(*found)
    assert 0 < float(metrics["clipped_low"].value) < 0.6 and 0 < float(metrics["clipped_high"].value) < 0.6


@pytest.mark.parametrize("case", SPECS)
def test_preparing(case):
    fields, _ = make_fields(case)
    batch, metrics = prepare(RolloutBatch(**fields), config_of(case))
    advantages, counts = reference_prepared(fields, SPECS[case])
    np.testing.assert_allclose(batch.advantages, advantages, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(batch.mask) > 0, counts)
    np.testing.assert_array_equal(batch.rewards, fields["rewards"])
    real = fields["groups"] >= 0
    gone = real & (fields["mask"].any(1)) & ~counts.any(1)
    np.testing.assert_allclose(metrics["reward"].value, fields["rewards"][real].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["truncated"].value, fields["truncated"][real].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["dropped"].value, gone.sum() / 15, rtol=1e-6)
    # The soft punishment of long completions tells equal rewards apart: only then may no group be dead.
    dead = len({int(g) for g in fields["groups"][real] if not advantages[fields["groups"] == g].any()})
    assert float(metrics["dead_groups"].total) == dead and float(metrics["dead_groups"].weight) == 4


def test_equal_rewards_move_nothing():
    for case in ("dapo", "dr_grpo", "gspo", "cispo", "batch_std", "dual_clip"):
        fields, logprobs = make_fields(case)
        fields["rewards"] = np.full(16, 0.7, np.float32)
        config = dataclasses.replace(config_of(case), overlong="keep")
        batch, _ = prepare(RolloutBatch(**fields), config)
        (loss, _), gradient = value_and_gradient(logprobs, batch, denominators(batch.mask), config)
        assert float(loss) == 0 and not np.any(gradient)


@pytest.mark.parametrize("case", PRESETS)
def test_on_policy_nothing_is_clipped(case):
    batch, _, totals, _ = prepared(case)
    batch = batch._replace(reference_logprobs=batch.old_logprobs)
    (_, metrics), gradient = value_and_gradient(batch.old_logprobs, batch, totals, config_of(case))
    values = {name: float(mean.value) for name, mean in metrics.items()}
    assert values == {"ratio": 1.0, "clipped_low": 0.0, "clipped_high": 0.0, "kl": 0.0}
    # With ratio 1 the gradient is the plain policy gradient -A, weighted; sequence means share A among the tokens.
    lengths = np.asarray(batch.mask).sum(1, keepdims=True)
    divisor = {"dapo": float(totals.tokens), "dr_grpo": CAP * float(totals.rows)}
    weight = 1 / divisor.get(case, np.maximum(lengths, 1) * float(totals.rows))
    wanted = -np.asarray(batch.advantages)[:, None] * np.asarray(batch.mask) * weight
    np.testing.assert_allclose(gradient, wanted, atol=1e-7)


def test_metrics():
    """Shares and means over the counted tokens, by hand."""
    ratios = np.array([[0.5, 1.0, 1.5, 9.0], [0.5, 1.0, 1.5, 9.0], [0.5, 1.0, 1.5, 9.0]])
    batch = RolloutBatch(
        tokens=np.zeros((3, 4), np.int32),
        mask=np.array([[1, 1, 1, 0]] * 3, np.float32),
        groups=np.zeros(3, np.int32),
        old_logprobs=np.full((3, 4), -3, np.float32),
        rewards=np.zeros(3, np.float32),
        truncated=np.zeros(3, bool),
        advantages=np.array([1, -1, 0], np.float32),
        importance=np.full((3, 4), 0.5, np.float32),
    )
    logprobs = (np.log(ratios) - 3).astype(np.float32)
    entropy = np.array([[1, 2, 3, np.nan]] * 3, np.float32)
    _, metrics = objective(logprobs, batch, denominators(batch.mask), ObjectiveConfig(), entropy)
    values = {name: (float(m.value), float(m.weight)) for name, m in metrics.items()}
    wanted = dict(ratio=1.0, clipped_low=1 / 9, clipped_high=1 / 9, importance=0.5, entropy=2.0)
    assert values == {name: (pytest.approx(value), 9) for name, value in wanted.items()}
    _, metrics = objective(logprobs, batch, denominators(batch.mask), ObjectiveConfig(dual_clip=1.4))
    assert float(metrics["clipped_high"].value) == pytest.approx(2 / 9)


def test_kl_estimators_agree_in_expectation():
    """Sums over a small vocabulary: k1 and k3 are unbiased, and k2's mean gradient is that of the true divergence."""
    rng = np.random.default_rng(2)
    logits, other = rng.normal(size=(2, 9))
    mask = np.ones((1, 9), np.float32)
    reference_logprobs = jax.nn.log_softmax(jnp.asarray(other, jnp.float32))[None]

    def divergence(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - reference_logprobs[0]))

    def mean_estimate(logits, estimator):
        logp = jax.nn.log_softmax(logits)
        drawn = jax.lax.stop_gradient(jnp.exp(logp))  # samples are constants for the gradient
        return jnp.sum(drawn * kl(logp[None], reference_logprobs, mask, estimator)[0])

    logits = jnp.asarray(logits, jnp.float32)
    truth = float(divergence(logits))
    assert float(mean_estimate(logits, "k1")) == pytest.approx(truth, rel=1e-5)
    assert float(mean_estimate(logits, "k3")) == pytest.approx(truth, rel=1e-5)
    assert not float(mean_estimate(logits, "k2")) == pytest.approx(truth, rel=1e-2)
    np.testing.assert_allclose(jax.grad(mean_estimate)(logits, "k1"), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(mean_estimate)(logits, "k2"), jax.grad(divergence)(logits), atol=1e-6)


def test_no_gradient_through_constants():
    """Old, reference, learner's old log-probs, weights and advantages are data."""
    batch, logprobs, totals, _ = prepared("importance")
    config = config_of("importance")
    names = ("advantages", "importance", "reference_logprobs")

    def loss(chosen):
        return objective(logprobs, batch._replace(**chosen), totals, config)[0]

    gradients = jax.grad(loss)({name: jnp.asarray(getattr(batch, name)) for name in names})
    assert not np.any(gradients["importance"]) and not np.any(gradients["reference_logprobs"])
    weights = jax.grad(lambda x: jnp.sum(truncated_importance(x, batch.old_logprobs, batch.mask, 2.0)))(logprobs)
    assert not np.any(weights)


EXTREMES = st.sampled_from([0.0, -1e-38, -1e-6, -0.7, -3.0, -88.0, -1e4, -1e30, -3e38, np.nan, -np.inf])


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.lists(EXTREMES, min_size=36, max_size=36),
    rewards=st.lists(st.sampled_from([0.0, 1.0, 1e-7, -1e3, 1e15, 0.3]), min_size=4, max_size=4),
    mask=st.lists(st.sampled_from([0.0, 1.0]), min_size=12, max_size=12),
    case=st.sampled_from(["paper", "dapo", "dr_grpo", "gspo", "cispo", "k2", "batch_std", "importance"]),
)
def test_no_nan(numbers, rewards, mask, case):
    """Log-probs that count may be any finite number, others anything at all."""
    mask = np.reshape(mask, (4, 3)).astype(np.float32)
    logprobs, old, ref = np.reshape(numbers, (3, 4, 3)).astype(np.float32)
    usable = [np.where((mask > 0) & ~np.isfinite(x), np.float32(-3e38), x) for x in (logprobs, old, ref)]
    batch = RolloutBatch(
        tokens=np.zeros((4, 3), np.int32),
        mask=mask,
        groups=np.array([0, 1, 0, 1], np.int32),
        old_logprobs=usable[1],
        rewards=np.array(rewards, np.float32),
        truncated=np.array([True, False, False, False]),
        reference_logprobs=usable[2],
        importance=np.ones((4, 3), np.float32) if case.startswith("importance") else None,
    )
    config = config_of(case)
    batch, _ = prepare(batch, config)
    (loss, metrics), gradient = value_and_gradient(usable[0], batch, denominators(batch.mask), config)
    # CISPO's value holds the log-prob itself, and -3e38 times a weight may leave float32; its gradient may not.
    if not case.startswith("cispo"):
        assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient)), (gradient, case)
    assert all(np.isfinite(mean.value) for mean in metrics.values())


def test_everything_masked_is_no_step():
    fields, logprobs = make_fields("dapo")
    fields["mask"] = np.zeros_like(fields["mask"])
    for case in PRESETS:
        batch, _ = prepare(RolloutBatch(**fields), config_of(case))
        (loss, metrics), gradient = value_and_gradient(logprobs, batch, denominators(batch.mask), config_of(case))
        assert float(loss) == 0 and not np.any(gradient) and float(metrics["ratio"].value) == 0


def test_bfloat16_is_widened_first():
    for case in ("paper", "cispo"):
        batch, logprobs, totals, _ = prepared(case)
        names = ("old_logprobs", "reference_logprobs")
        low = {name: jnp.asarray(getattr(batch, name), jnp.bfloat16) for name in names}
        wide = {name: x.astype(jnp.float32) for name, x in low.items()}
        own = jnp.asarray(logprobs, jnp.bfloat16)
        narrow = objective(own, batch._replace(**low), totals, config_of(case))[0]
        widened = objective(own.astype(jnp.float32), batch._replace(**wide), totals, config_of(case))[0]
        assert narrow.dtype == jnp.float32 and float(narrow) == float(widened)


def test_what_is_missing_is_said():
    fields, logprobs = make_fields("paper")
    batch = RolloutBatch(**fields)
    totals = denominators(batch.mask)
    with pytest.raises(ValueError, match="pass the whole batch through `prepare`"):
        objective(logprobs, batch, totals, PRESETS["paper"])
    ready = prepare(batch, PRESETS["paper"])[0]
    with pytest.raises(ValueError, match="beta = 0.1 needs the log-probs of the reference"):
        objective(logprobs, ready._replace(reference_logprobs=None), totals, PRESETS["paper"])
