"""Deliberate mistakes must be seen by the parity checks, at the stage where they are made."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm4d_jax.models import layers, rope, text, vision
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.verify.model import Tolerances, verify_case

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def fresh_traces():
    """Compiled functions of the unmutated model must not serve a mutated one, nor the other way round."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def failed_stages(name: str, case: str = "video") -> list[str]:
    model = load_model(GOLDEN / name, dtype=jnp.float32, attention="xla")
    with jax.default_matmul_precision("highest"):
        checks = list(verify_case(model, GOLDEN / name / f"{case}.npz", name, Tolerances(), "auto"))
    return [c.group for c in checks if not c.passed]


def drop_deepstack(monkeypatch):
    embed = QwenVL.embed
    monkeypatch.setattr(QwenVL, "embed", lambda self, *a: (embed(self, *a)[0], None))


def shift_deepstack(monkeypatch):
    embed = QwenVL.embed

    def shifted(self, *a):
        x, deepstack = embed(self, *a)
        return x, None if deepstack is None else deepstack[::-1]

    monkeypatch.setattr(QwenVL, "embed", shifted)


def one_dimensional_rope(monkeypatch):
    monkeypatch.setattr(rope, "frequency_axes", lambda sections, _: np.zeros(sum(sections), np.int32))


def contiguous_instead_of_interleaved(monkeypatch):
    original = rope.frequency_axes
    monkeypatch.setattr(rope, "frequency_axes", lambda sections, interleaved: original(sections, not interleaved))


def frames_see_each_other(monkeypatch):
    original = vision.attention

    def joined(q, k, v, *, segments, **kw):
        def join(x):
            return x.reshape(1, -1, *x.shape[2:])

        out = original(join(q), join(k), join(v), segments=join(segments), **kw)
        return out.reshape(q.shape)

    monkeypatch.setattr(vision, "attention", joined)


def swapped_gelu(monkeypatch):
    gelu = jax.nn.gelu
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x, approximate=not approximate))


def no_query_norm(monkeypatch):
    def project(self, x, cos, sin, key=None):
        q, k, v = (p(x).reshape(*x.shape[:2], -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v

    monkeypatch.setattr(text.SelfAttention, "project", project)


def wrong_epsilon(monkeypatch):
    original = layers.LayerNorm.__init__

    def init(self, width, eps, **kw):
        original(self, width, eps * 1000, **kw)

    monkeypatch.setattr(layers.LayerNorm, "__init__", init)


def whole_frame_windows(monkeypatch):
    monkeypatch.setattr(vision.VisionTower, "_segments", lambda self, inputs, whole_frame: inputs.frame_segments)


def raw_router_weights(monkeypatch):
    original = jax.lax.top_k

    def halved(x, k):
        values, index = original(x, k)
        return values.at[..., 0].multiply(0.5), index

    monkeypatch.setattr(jax.lax, "top_k", halved)


@pytest.mark.parametrize(
    ("mutate", "name", "first"),
    [
        (drop_deepstack, "qwen3_vl", "decoder layers"),
        (shift_deepstack, "qwen3_vl", "decoder layers"),
        (one_dimensional_rope, "qwen3_vl", "embeddings"),
        (one_dimensional_rope, "qwen2_5_vl", "embeddings"),
        (contiguous_instead_of_interleaved, "qwen3_vl", "embeddings"),
        (frames_see_each_other, "qwen3_vl", "vision blocks"),
        (frames_see_each_other, "qwen2_5_vl", "vision blocks"),
        (whole_frame_windows, "qwen2_5_vl", "vision blocks"),
        (swapped_gelu, "qwen3_vl", "vision blocks"),
        (swapped_gelu, "qwen2_5_vl", "vision features"),
        (wrong_epsilon, "qwen3_vl", "vision blocks"),
        (no_query_norm, "qwen3_vl", "decoder layers"),
        (raw_router_weights, "qwen3_vl_moe", "decoder layers"),
    ],
)
def test_mistake_is_found_where_it_is_made(monkeypatch, mutate, name, first):
    mutate(monkeypatch)
    failed = failed_stages(name)
    assert failed and failed[0] == first
    assert "logits" in failed
