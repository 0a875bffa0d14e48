"""Attention backends against a float64 softmax, leaks between segments, and refusals."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm4d_jax.models import cudnn
from mllm4d_jax.models.attention import Backend, BackendError, attention, choose_backend, masked_attention


def inputs(b=2, s=70, n=4, k=2, d=16, seed=0):
    rng = np.random.default_rng(seed)
    q, key, v = (rng.normal(size=(b, s, h, d)).astype(np.float32) for h in (n, k, k))
    segments = np.repeat([[1, 2, 3, 0]], b, 0).repeat([20, 30, 10, s - 60], 1).astype(np.int32)
    return q, key, v, segments


def reference(q, k, v, segments, causal):
    """Softmax over visible keys, one query at a time, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    b, s, n, d = q.shape
    group = n // k.shape[2]
    out = np.zeros_like(q)
    for i in range(b):
        for h in range(n):
            for t in range(s):
                seen = segments[i] == segments[i, t]
                if causal:
                    seen &= np.arange(s) <= t
                scores = k[i, seen, h // group] @ q[i, t, h] / np.sqrt(d)
                weights = np.exp(scores - scores.max())
                out[i, t, h] = weights / weights.sum() @ v[i, seen, h // group]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_equals_float64(backend, causal):
    q, k, v, segments = inputs()
    with jax.default_matmul_precision("highest"):
        out = attention(q, k, v, segments=segments, causal=causal, backend=Backend(backend, interpret=True))
    real = segments > 0
    np.testing.assert_allclose(np.asarray(out)[real], reference(q, k, v, segments, causal)[real], atol=2e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("causal", [True, False])
def test_splash_gradients_equal_xla(causal):
    q, k, v, segments = inputs(b=1, s=130, d=24)
    real = jnp.asarray(segments > 0)[..., None, None]

    def loss(backend, *qkv):
        out = attention(*qkv, segments=segments, causal=causal, backend=Backend(backend, interpret=True))
        return jnp.sum(jnp.sin(out) * real)

    with jax.default_matmul_precision("highest"):
        ours, expected = (jax.grad(lambda *a, b=b: loss(b, *a), (0, 1, 2))(q, k, v) for b in ("splash", "xla"))
    for a, e in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_nothing_leaks_from_another_segment(backend):
    q, k, v, segments = inputs()
    other = (segments == 2)[..., None, None]

    def run(k, v):
        out = attention(q, k, v, segments=segments, causal=False, backend=Backend(backend, interpret=True))
        return np.asarray(out)[segments == 1]

    before = run(k, v)
    after = run(np.where(other, 1e3, k).astype(np.float32), np.where(other, -1e3, v).astype(np.float32))
    np.testing.assert_array_equal(before, after)
    own = (segments == 1)[..., None, None]
    assert np.abs(run(k, np.where(own, v + 1, v)) - before).max() > 0.5


def test_cache_attention_equals_plain_attention():
    q, k, v, segments = inputs()
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones((70, 70), bool))
    with jax.default_matmul_precision("highest"):
        whole = attention(q, k, v, segments=segments, causal=True, backend=Backend("xla"))
        one = masked_attention(q[:, 40:41], k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, 40:41])
    np.testing.assert_allclose(one[:, 0], whole[:, 40], atol=1e-6)


def mesh_of(platform, capability="9.0"):
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform, compute_capability=capability)]))


@pytest.mark.parametrize(
    ("requested", "dtype", "platform", "message"),
    [
        ("splash", jnp.bfloat16, "cpu", "'splash' is a TPU kernel and this process runs on cpu"),
        ("splash", jnp.bfloat16, "gpu", "'splash' is a TPU kernel and this process runs on gpu"),
        ("cudnn", jnp.bfloat16, "cpu", "'cudnn' needs an NVIDIA GPU and this process runs on cpu"),
        ("cudnn", jnp.float32, "gpu", "needs bfloat16 or float16 activations, got float32"),
        ("flash", jnp.float32, "cpu", "unknown attention backend 'flash'.*splash"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(requested, dtype, platform, message):
    with pytest.raises(BackendError, match=message):
        choose_backend(requested, dtype, mesh_of(platform))


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "xla"), ("tpu", "splash")])
def test_automatic_choice(platform, expected):
    assert choose_backend("auto", jnp.bfloat16, mesh_of(platform)).name == expected
    assert choose_backend("xla", jnp.bfloat16, mesh_of(platform)).name == "xla"


@pytest.mark.parametrize(
    ("capability", "head_dim", "known", "reason"),
    [
        ("7.5", 128, True, "compute capability 8.0 or more, and this one has 7.5"),
        ("8.0", 192, True, "heads of 192 are larger than the 128 that it takes here"),
        ("9.0", 264, True, "heads of 264 are larger than the 256"),
        ("9.0", 128, False, "offers cuDNN's attention in another form .AttributeError"),
        ("8.6", 128, True, None),
        ("9.0", 192, True, None),
    ],
)
def test_a_gpu_that_cudnn_cannot_serve_gets_xla_with_a_warning(
    monkeypatch, caplog, capability, head_dim, known, reason
):
    if not known:  # a release of JAX without the names that are used
        monkeypatch.setattr(cudnn, "_primitives", lambda: SimpleNamespace())
    mesh = mesh_of("gpu", capability)
    chosen = choose_backend("auto", jnp.bfloat16, mesh, head_dim)
    assert chosen.name == ("xla" if reason else "cudnn")
    assert [bool(re.search(reason or "", r.getMessage())) for r in caplog.records] == ([True] if reason else [])
    if reason:
        with pytest.raises(BackendError, match=reason):
            choose_backend("cudnn", jnp.bfloat16, mesh, head_dim)
    assert choose_backend("auto", jnp.float32, mesh).name == "xla" and len(caplog.records) == bool(reason)
