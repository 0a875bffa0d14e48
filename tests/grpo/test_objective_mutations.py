"""Deliberate mistakes in every piece of the objectives: the comparison with the float64 loops must see each."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

import mllm4d_jax.grpo
from tests.grpo.objective_cases import (
    CAP,
    PRESET_SPECS,
    SPECS,
    VARIANTS,
    make_fields,
    reference,
    token_advantages,
)

PACKAGE = "mllm4d_jax.grpo"
FOLDER = pathlib.Path(mllm4d_jax.grpo.__file__).parent
CHAIN = ("batch", "advantages", "ratios", "presets", "objective")  # each imports only from those before it

# module, text that stands there, what it becomes
MUTATIONS = [
    ("advantages", "(above - mean[:, None]) ** 2", "jnp.abs(above - mean[:, None])"),
    ("advantages", "jnp.sum(squares, axis=1) / jnp.maximum(size - ddof, 1.0)", "jnp.sum(squares, axis=1) / size"),
    ("advantages", "stats.std + eps", "stats.std"),
    ("advantages", "everything, ddof).std + eps", "groups, ddof).std + eps"),
    ("advantages", "(rewards - low) - mean", "rewards - low"),
    ("advantages", "jnp.where(stats.dead, 0.0, stats.centered / divisor)", "stats.centered / divisor"),
    ("advantages", "DEAD_SPREAD = 1e-6", "DEAD_SPREAD = 1e-7"),
    ("advantages", "divisor = 1.0", "divisor = stats.std + eps"),
    ("advantages", "(max_length - cache)) / cache", "max_length) / cache"),
    ("advantages", "(max_length - cache)) / cache", "(max_length - cache)) / max_length"),
    ("advantages", "return -penalty *", "return -1.0 *"),
    ("ratios", "jnp.clip(ours - theirs,", "jnp.clip(theirs - ours,"),
    ("ratios", "        return jnp.exp(logs)", "        return 1 + logs"),
    ("ratios", "axis=1, keepdims=True) / jnp.maximum(count, 1.0)", "axis=1, keepdims=True)"),
    ("ratios", "jnp.maximum(count, 1.0)", "mask.shape[1]"),
    ("ratios", "jax.lax.stop_gradient(sequence) * jnp.exp(own)", "sequence * jnp.exp(own)"),
    ("ratios", "jax.lax.stop_gradient(sequence) * jnp.exp(own)", "jnp.broadcast_to(sequence, mask.shape)"),
    ("ratios", 'if level == "sequence":', 'if level != "token":'),
    ("ratios", "jnp.where(counts, logprobs.astype(jnp.float32), 0.0)", "logprobs.astype(jnp.float32)"),
    ("objective", "floor, ceiling = 1.0 - config.eps_low, 1.0", "floor, ceiling = 1.0 - config.eps_high, 1.0"),
    ("objective", "1.0 + config.eps_high", "1.0 + config.eps_low"),
    ("objective", "(advantages < 0) & (ratio < floor)", "(ratio < floor)"),
    ("objective", "(advantages > 0) & (ratio > ceiling)", "(ratio > ceiling)"),
    ("objective", "jnp.where(low, floor,", "jnp.where(low, ratio,"),
    ("objective", "jnp.where(high, ceiling, ratio)", "ratio"),
    ("objective", "return -bounded", "return bounded"),
    ("objective", "jnp.where(worst, config.dual_clip, bounded)", "bounded"),
    ("objective", "(advantages < 0) & (ratio > config.dual_clip)", "ratio > config.dual_clip"),
    ("objective", "jax.lax.stop_gradient(jnp.clip(ratio, floor, ceiling))", "jnp.clip(ratio, floor, ceiling)"),
    ("objective", "jax.lax.stop_gradient(jnp.clip(ratio, floor, ceiling))", "jax.lax.stop_gradient(ratio)"),
    ("objective", "jnp.clip(ratio, floor, ceiling)", "jnp.minimum(ratio, ceiling)"),
    ("objective", "-weight * advantages * logprobs", "-weight * advantages"),
    ("objective", "loss = weights * loss", "loss = loss"),
    ("objective", "jnp.where(mask > 0, batch.importance, 0.0)", "batch.importance"),
    ("objective", "loss + config.beta * divergence", "loss - config.beta * divergence"),
    ("objective", "loss + config.beta * divergence", "loss + divergence"),
    ("objective", "d = -log_ratio(", "d = log_ratio("),
    ("objective", "        return -d", "        return d"),
    ("objective", "return 0.5 * d * d", "return d * d"),
    ("objective", "return jnp.expm1(d) - d", "return jnp.expm1(d)"),
    ("objective", "return jnp.expm1(d) - d", "return jnp.expm1(-d) + d"),
    ("objective", "(jnp.maximum(length, 1.0) * totals.rows)", "totals.tokens"),
    ("objective", "jnp.maximum(length, 1.0) * totals.rows", "jnp.maximum(length, 1.0) * mask.shape[0]"),
    (
        "objective",
        "return mask / totals.tokens",
        "return mask / (totals.rows * jnp.maximum(mask.sum(1, keepdims=True), 1))",
    ),
    ("objective", "(max_completion * totals.rows)", "totals.tokens"),
    ("objective", 'config.overlong == "soft"', "False"),
    ("objective", 'config.overlong == "mask"', "False"),
    ("objective", "~batch.truncated", "batch.truncated"),
    ("objective", "if config.dynamic_sampling:", "if False:"),
    ("objective", "informative(batch.rewards,", "informative(rewards,"),
    ("objective", "mask=batch.mask * kept[:, None]", "mask=batch.mask"),
    ("batch", "jnp.any(mask > 0, axis=1)", "jnp.ones(mask.shape[0])"),
    ("batch", "jnp.sum(mask.astype(jnp.float32)), 1.0)", "mask.size, 1.0)"),
    ("presets", "ddof: int = 1", "ddof: int = 0"),
    ("presets", "std_eps: float = 1e-4", "std_eps: float = 1e-3"),
    ("presets", "eps_low: float = 0.2", "eps_low: float = 0.1"),
    ("presets", 'kl: str = "k3"', 'kl: str = "k2"'),
    ("presets", 'reduction: str = "sequence_mean"', 'reduction: str = "token_mean"'),
    ("presets", "ObjectiveConfig(beta=0.1)", "ObjectiveConfig(beta=0.001)"),
    ("presets", "ObjectiveConfig(beta=0.001)", "ObjectiveConfig(beta=0.1)"),
    ("presets", "eps_high=0.28, ", ""),
    ("presets", 'overlong="soft", ', ""),
    ("presets", "dynamic_sampling=True", "dynamic_sampling=False"),
    ("presets", 'scale="none", ', ""),
    ("presets", 'reduction="constant"', 'reduction="token_mean"'),
    ("presets", "eps_low=3e-4, eps_high=4e-4", "eps_low=4e-4, eps_high=3e-4"),
]


def load_chain(folder: pathlib.Path, monkeypatch, changed: dict[str, str]) -> dict:
    """Fresh modules, those in `changed` from other text, each seeing the fresh ones before it."""
    loaded = {}
    for name in CHAIN:
        path = folder / f"{name}.py"
        path.write_text(changed.get(name) or (FOLDER / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        loaded[name] = module
    return loaded


def agrees(modules: dict, case: str) -> bool:
    """Value and gradient of a case equal the reference, to 2e-6 of the largest entry."""
    fields, logprobs = make_fields(case)
    presets, batch_module = modules["presets"], modules["batch"]
    if case in PRESET_SPECS:
        config = dataclasses.replace(presets.PRESETS[case], max_completion=CAP)
    else:
        config = presets.ObjectiveConfig(max_completion=CAP, **VARIANTS[case])
    batch, _ = modules["objective"].prepare(batch_module.RolloutBatch(**fields), config)
    if token_advantages(case) is not None:
        batch = batch._replace(advantages=token_advantages(case))
    totals = batch_module.denominators(batch.mask)

    def value(x):
        return modules["objective"].objective(x, batch, totals, config)[0]

    loss, gradient = jax.value_and_grad(value)(logprobs)
    wanted_loss, wanted = reference(case)
    error = np.abs(np.asarray(gradient) - wanted).max()
    return bool(abs(float(loss) - wanted_loss) < 2e-6 and error < 2e-6 * np.abs(wanted).max())


def test_the_unchanged_text_agrees(tmp_path, monkeypatch):
    modules = load_chain(tmp_path, monkeypatch, {})
    assert all(agrees(modules, case) for case in SPECS)


@pytest.mark.parametrize(("module", "text", "mistake"), MUTATIONS)
def test_a_mistake_is_seen(tmp_path, monkeypatch, module, text, mistake):
    source = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
    code = source.replace(text, mistake)
    assert code != source, "the mutation no longer applies: update it"
    modules = load_chain(tmp_path, monkeypatch, {module: code})
    assert not all(agrees(modules, case) for case in SPECS)
