"""The port equals the recorded Hugging Face reference, case by case."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from mllm4d_jax.models.hf import load_model
from mllm4d_jax.verify.model import Tolerances, case_files, verify_case, verify_gradients

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODELS = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")
CASES = [(m, p.stem) for m in MODELS for p in case_files(GOLDEN / m)]


@functools.lru_cache
def model(name: str):
    return load_model(GOLDEN / name, dtype=jnp.float32, attention="xla")


def test_every_recorded_case_is_listed():
    assert len(CASES) == 19


@pytest.mark.parametrize(("name", "case"), CASES)
def test_case(name, case):
    path = GOLDEN / name / f"{case}.npz"
    with jax.default_matmul_precision("highest"):
        checks = list(verify_case(model(name), path, f"{name}/{case}", Tolerances(), "auto"))
    assert len(checks) >= 2
    assert not [c.line(50) for c in checks if not c.passed]
    groups = {c.group for c in checks}
    assert "loss" in groups
    if case in ("image", "video"):
        stages = {"positions", "patch embedding", "vision blocks", "vision features", "embeddings", "decoder layers"}
        assert stages | {"final norm", "logits", "greedy ids", "greedy logits"} <= groups


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    folder = GOLDEN / name
    with jax.default_matmul_precision("highest"):
        checks = verify_gradients(model(name), folder, folder / "grads_batch.json", name, Tolerances(), "auto")
    assert {c.group for c in checks} == {"loss", "gradients"}
    assert not [c.line(50) for c in checks if not c.passed]
    compared = next(c for c in checks if c.group == "gradients").compared
    assert compared == {"qwen3_vl": 115, "qwen3_vl_moe": 93, "qwen2_5_vl": 93}[name]


def test_both_recorded_time_rules_of_qwen2_5():
    path = GOLDEN / "qwen2_5_vl" / "video_tdom.npz"
    with jax.default_matmul_precision("highest"):
        checks = list(verify_case(model("qwen2_5_vl"), path, "tdom", Tolerances(), "auto"))
    assert {c.case for c in checks} == {"tdom[release]", "tdom[hf517]"}
    assert all(c.passed for c in checks)
