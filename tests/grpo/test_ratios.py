"""Ratios, and the gap between the sampler's and the learner's log-probs."""

from __future__ import annotations

import numpy as np

from mllm4d_jax.grpo.batch import RolloutBatch
from mllm4d_jax.grpo.ratios import correct_for_gap, policy_ratio, sampler_gap, truncated_importance
from tests.grpo.objective_cases import make_fields


def test_ratio_bounds_and_empty_rows():
    mask = np.array([[1, 1], [0, 0]], np.float32)
    logprobs, old = np.array([[0, -50], [np.nan] * 2], np.float32), np.array([[-50, -50], [np.nan] * 2], np.float32)
    for level, wanted in (("token", [np.exp(20), 1.0]), ("sequence", [np.exp(10)] * 2)):
        out = np.asarray(policy_ratio(logprobs, old, mask, level))
        np.testing.assert_allclose(out, [wanted, [1, 1]], rtol=1e-6)


def test_gap_and_its_correction():
    fields, learner = make_fields("paper")
    fields["mask"][:, 0] = fields["groups"] >= 0
    fields["old_logprobs"][:, 0], learner[:, 0] = -1.0, -1.0 + 1e-3 * np.arange(16)
    batch, counts = RolloutBatch(**fields), fields["mask"] > 0
    d = (learner.astype(np.float64) - fields["old_logprobs"])[counts]
    gap = sampler_gap(learner, batch.old_logprobs, batch.mask)
    np.testing.assert_allclose(gap.mean_abs.value, np.abs(d).mean(), rtol=1e-5)
    np.testing.assert_allclose(gap.max_abs, np.abs(d).max(), rtol=1e-5)
    np.testing.assert_allclose(gap.kl.value, (np.exp(d) - d - 1).mean(), rtol=1e-5)

    weights = np.asarray(truncated_importance(learner, batch.old_logprobs, batch.mask, 1.1))
    np.testing.assert_allclose(weights[counts], np.minimum(np.exp(d), 1.1), rtol=1e-5)
    assert (np.exp(d) > 1.1).any() and (np.exp(d) < 0.9).any()

    mean = float(np.abs(d).mean())
    kept, _ = correct_for_gap(batch, learner, bound=mean * 1.01, cap=1.1)
    np.testing.assert_array_equal(kept.old_logprobs, batch.old_logprobs)
    assert np.all(np.asarray(kept.importance) == 1)
    corrected, measured = correct_for_gap(batch, learner, bound=mean * 0.99, cap=1.1)
    np.testing.assert_array_equal(corrected.old_logprobs, learner)
    np.testing.assert_array_equal(corrected.importance, weights)
    assert float(measured.mean_abs.value) == float(gap.mean_abs.value)
    same, gap = correct_for_gap(batch, batch.old_logprobs, bound=0.0, cap=2.0)
    assert float(gap.max_abs) == 0 and float(gap.kl.value) == 0 and np.all(np.asarray(same.importance) == 1)
