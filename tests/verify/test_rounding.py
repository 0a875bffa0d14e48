"""`verify` on models that amplify rounding: a right port passes, a wrong one does not."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mllm4d_jax.models import layers, rope  # noqa: E402
from mllm4d_jax.models.hf import load_model  # noqa: E402
from mllm4d_jax.verify.model import Tolerances, verify_case  # noqa: E402
from tests.verify.test_variants import empty_model  # noqa: E402
from tests.verify.variants import MIXED, Variant  # noqa: E402
from tools.reference import cases, tensors  # noqa: E402

# (model type, layers, vision blocks, weights in units of the usual deviation): float32 is up to 2e-2 off in the last.
MODELS = (("qwen3_vl", 3, 3, 3.0), ("qwen3_vl_moe", 2, 3, 3.0), ("qwen2_5_vl", 12, 8, 2.0), ("qwen2_5_vl", 3, 4, 10.0))


def record(folder, model_type, depth, blocks, scale) -> None:
    """A random model and what transformers computes with it."""
    variant = Variant(model_type, text={"num_hidden_layers": depth}, vision={"depth": blocks})
    torch.manual_seed(0)
    model = empty_model(variant)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p.shape[1:].numel() if p.ndim > 1 else 1
            if p.ndim > 1:
                p.normal_(0, 0.5 if "embed" in name else scale * fan_in**-0.5)
            else:
                p.normal_(0, 0.1).add_(0.0 if name.endswith("bias") else 1.0)
    model.save_pretrained(folder)
    model, prompts, rng = tensors.load(str(folder)), cases.PromptMaker.from_folder(folder, 0), np.random.default_rng(0)
    inputs = cases.batch(prompts, [prompts.row(segments, rng) for segments in MIXED], "left")
    np.savez(folder / "mixed.npz", **tensors.record(model, inputs), **tensors.generate(model, inputs, 4))


def checks(folder, port=contextlib.nullcontext):
    model = load_model(folder, dtype=jnp.float32, attention="xla")
    with jax.default_matmul_precision("highest"), port():
        found = list(verify_case(model, folder / "mixed.npz", "m", Tolerances(), "auto"))
    for check in found:
        print(check.line(40))
    return found


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-{m[1]}-{m[3]:g}")
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    record(made, *request.param)
    return made


def test_a_right_port_passes(folder):
    assert not [c.line(40) for c in checks(folder) if not c.passed]


@contextlib.contextmanager
def other_theta():
    """Rotary frequencies that are off by a thousandth."""
    with pytest.MonkeyPatch.context() as patch:
        right = rope.inverse_frequencies
        patch.setattr(rope, "inverse_frequencies", lambda *a: (right(*a)[0] * np.float32(1.001), right(*a)[1]))
        yield


def test_a_wrong_port_fails(folder):
    failed = {c.group for c in checks(folder, other_theta) if not c.passed}
    assert {"embeddings", "decoder layers", "logits"} <= failed


@contextlib.contextmanager
def ten_bits():
    """What enters a projection is rounded to 10 bits of mantissa, as TF32 does; float32 has 23."""
    with pytest.MonkeyPatch.context() as patch:
        right = layers.Linear.__call__
        patch.setattr(
            layers.Linear, "__call__", lambda self, x, *a: right(self, jax.lax.reduce_precision(x, 8, 10), *a)
        )
        yield


def test_rounding_coarser_than_float32_fails(folder):
    failed = {c.group for c in checks(folder, ten_bits) if not c.passed}
    assert {"vision blocks", "decoder layers", "logits"} <= failed
