"""Rotary tables against closed forms."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mllm4d_jax.models import rope
from mllm4d_jax.models.config import RopeConfig

PLAIN = RopeConfig(theta=5e6, sections=(24, 20, 20), interleaved=True)


def test_plain_frequencies_are_powers_of_theta():
    inv_freq, scale = rope.inverse_frequencies(PLAIN, 128)
    np.testing.assert_allclose(inv_freq, 5e6 ** (-np.arange(0, 128, 2) / 128), rtol=1e-6)
    assert scale == 1.0


def test_text_positions_alone_are_ordinary_rope():
    positions = np.broadcast_to(np.arange(50), (3, 1, 50))
    for interleaved in (True, False):
        config = dataclasses.replace(PLAIN, interleaved=interleaved)
        cos, _ = rope.text_rope(config, 128, jnp.asarray(positions), jnp.float32)
        angles = np.arange(50)[:, None] * 5e6 ** (-np.arange(0, 128, 2) / 128)
        np.testing.assert_allclose(cos[0, :, :64], np.cos(angles), atol=2e-5)
        np.testing.assert_array_equal(cos[0, :, :64], cos[0, :, 64:])


def test_rotation_preserves_scores_of_relative_positions():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 128)).astype(np.float32)

    def score(p, r):
        tables = [rope.text_rope(PLAIN, 128, jnp.full((3, 1, 1), x), jnp.float32) for x in (p, r)]
        return float(jnp.sum(rope.rotate(q, *tables[0]) * rope.rotate(k, *tables[1])))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-3)
    assert abs(score(7, 3) - score(9, 3)) > 1e-2


def test_yarn_keeps_high_and_divides_low_frequencies():
    yarn = (("factor", 4.0), ("original_max_position_embeddings", 4096.0))
    config = dataclasses.replace(PLAIN, yarn=yarn)
    plain, _ = rope.inverse_frequencies(PLAIN, 128)
    scaled, factor = rope.inverse_frequencies(config, 128)
    np.testing.assert_allclose(scaled[:5], plain[:5], rtol=1e-6)
    np.testing.assert_allclose(scaled[-5:], plain[-5:] / 4, rtol=1e-6)
    assert (np.diff(scaled / plain) <= 1e-6).all()
    assert factor == pytest.approx(0.1 * np.log(4) + 1)


def test_vision_angles_are_row_then_column():
    cos, sin = rope.vision_rope(16, jnp.array([[[3, 5]]]))
    inv = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    angles = np.concatenate([3 * inv, 5 * inv])
    np.testing.assert_allclose(cos[0, 0], np.cos(np.tile(angles, 2)), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(np.tile(angles, 2)), atol=1e-6)
