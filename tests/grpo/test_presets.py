"""Objectives by name, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from configs import common
from mllm4d_jax.grpo.advantages import SCALES
from mllm4d_jax.grpo.presets import (
    KL_ESTIMATORS,
    OVERLONG,
    PRESETS,
    REDUCTIONS,
    SURROGATES,
    ObjectiveConfig,
    resolve_objective,
)
from mllm4d_jax.grpo.ratios import LEVELS
from mllm4d_jax.grpo.settings import objective_of, rewards_of


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
    assert resolve_objective("gspo") is PRESETS["gspo"]
    assert PRESETS["dapo"].overlong_cache == 819
    with pytest.raises(ValueError, match="did you mean 'dr_grpo'"):
        resolve_objective("drgrpo")


def test_a_key_that_is_set_changes_its_piece_and_no_other():
    def objective(**values):
        return objective_of(common.config("grpo", {f"objective.{name}": value for name, value in values.items()}))

    assert objective() == PRESETS["paper"]  # the cap is the default of both
    for preset, expected in PRESETS.items():
        assert objective(preset=preset) == dataclasses.replace(expected, max_completion=4096)
    changed = objective(preset="dapo", beta=0.0, kl="k2", dynamic_sampling="off", eps_low=0.1)
    assert changed == dataclasses.replace(PRESETS["dapo"], beta=0.0, kl="k2", dynamic_sampling=False, eps_low=0.1)
    assert objective(dynamic_sampling="on").dynamic_sampling is True
    with pytest.raises(ValueError, match="beta >= 0"):
        objective(beta=-0.5)


def test_the_keys_offer_what_the_objective_knows():
    keys = {key.name: key for key in common.task_keys("grpo") if key.name.startswith("objective.")}
    pieces = {f"objective.{field.name}" for field in dataclasses.fields(ObjectiveConfig)}
    assert set(keys) - pieces == {"objective.preset", "objective.iterations"}
    choices = dict(kl=KL_ESTIMATORS, overlong=OVERLONG, reduction=REDUCTIONS, surrogate=SURROGATES)
    for name, known in (choices | dict(scale=SCALES, ratio=LEVELS)).items():
        assert keys[f"objective.{name}"].choices == ("", *known)


def test_a_reward_named_twice_has_both_weights():
    config = common.config("grpo", {"reward.functions": ("accuracy::0.5", "format::0.5", "accuracy::1.0")})
    once = common.config("grpo", {"reward.functions": ("accuracy::1.5", "format::0.5")})
    assert rewards_of(config).shares == rewards_of(once).shares
