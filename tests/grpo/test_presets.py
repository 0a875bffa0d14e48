"""Objectives by name, and what is refused."""

from __future__ import annotations

import pytest

from mllm4d_jax.grpo.presets import PRESETS, ObjectiveConfig, resolve_objective


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kl="k4"), "known: k1, k2, k3"),
        (dict(scale="std"), "known: group, batch, none"),
        (dict(ratio="word"), "known: token, sequence, sequence_token"),
        (dict(reduction="sum"), "known: sequence_mean"),
        (dict(eps_low=1.5), "0 <= eps_low <= 1"),
        (dict(dual_clip=1.1), "dual_clip > 1"),
        (dict(dual_clip=3.0, surrogate="cispo"), "goes with surrogate clip"),
        (dict(beta=-1.0), "beta >= 0"),
        (dict(beta=float("nan")), "beta >= 0"),
        (dict(importance_cap=0.5), "importance_cap >= 1"),
    ],
)
def test_a_bad_objective_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**change)


def test_presets_by_name():
    assert resolve_objective("gspo") is PRESETS["gspo"] and resolve_objective(PRESETS["dapo"]) is PRESETS["dapo"]
    assert PRESETS["dapo"].overlong_cache == 819
    with pytest.raises(ValueError, match="did you mean 'dr_grpo'"):
        resolve_objective("drgrpo")
