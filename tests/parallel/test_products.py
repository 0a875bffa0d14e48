"""Products summed in float32: values and gradients, in loops too, for both kinds of operands."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm4d_jax.parallel.products import compiler_options, einsum_f32, mixed_product

SHAPES = (
    ("bgknd,bkpd->bgknp", (2, 12, 2, 2, 32), (2, 2, 40, 32)),
    ("bgknp,bkpd->bgknd", (2, 12, 2, 2, 40), (2, 2, 40, 32)),
    ("bmh,hv->bmv", (2, 12, 128), (128, 512)),
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("subscripts", "left", "right"), SHAPES)
def test_values_and_gradients_against_float64(subscripts, left, right, dtype):
    """In a loop, where a CPU has no product of mixed types; 16-bit operands are exact, only the sums are rounded."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (left, right))
    weights = rng.normal(size=np.einsum(subscripts, np.zeros(left), np.zeros(right)).shape)

    def value(a, b):
        def body(total, scale):
            return total + scale * einsum_f32(subscripts, a, b), None

        return jax.lax.scan(body, jnp.zeros(weights.shape, jnp.float32), jnp.arange(3.0))[0]

    with jax.default_matmul_precision("highest"):
        out = jax.jit(value)(a, b)
        grads = jax.jit(jax.grad(lambda a, b: jnp.sum(value(a, b) * weights), (0, 1)))(a, b)
    exact = [np.asarray(x, np.float64) for x in (a, b)]
    assert out.dtype == jnp.float32 and grads[0].dtype == dtype
    expected = 3 * np.einsum(subscripts, *exact)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    inputs, result = subscripts.split("->")
    first, second = inputs.split(",")
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2  # cotangents are rounded to the operand's dtype
    for found, wanted in (
        (grads[0], 3 * np.einsum(f"{result},{second}->{first}", weights, exact[1])),
        (grads[1], 3 * np.einsum(f"{result},{first}->{second}", weights, exact[0])),
    ):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance * np.abs(wanted).max())


def gradients(subscripts, left, right, product):
    """(function of the operands and of the result's gradient, shapes of the operands) in bfloat16."""

    def grads(a, b, weights):
        return jax.grad(lambda a, b: jnp.sum(product(a, b) * weights), (0, 1))(a, b)

    return grads, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (left, right)]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("subscripts", "left", "right"), SHAPES)
def test_accelerators_multiply_no_widened_operand_in_either_direction(subscripts, left, right, platform):
    grads, shapes = gradients(subscripts, left, right, lambda a, b: einsum_f32(subscripts, a, b))
    out = jax.ShapeDtypeStruct(np.einsum(subscripts, np.zeros(left), np.zeros(right)).shape, jnp.float32)
    text = jax.jit(grads).trace(*shapes, out).lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo\.dot_general.*: \((.*)\) ->", text)
    assert len(products) >= 2 and all(p.count("xbf16>") == 2 for p in products), products


@pytest.mark.parametrize(("subscripts", "left", "right"), SHAPES)
def test_gradients_as_accelerators_compute_them(subscripts, left, right):
    rng = np.random.default_rng(1)
    exact = [np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64) for shape in (left, right)]
    weights = rng.normal(size=np.einsum(subscripts, *exact).shape)
    grads, _ = gradients(subscripts, left, right, mixed_product(subscripts))
    found = grads(*(jnp.asarray(x, jnp.bfloat16) for x in exact), weights)
    first, second, result = *subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    wanted = [np.einsum(f"{result},{second}->{first}", weights, exact[1])]
    wanted.append(np.einsum(f"{result},{first}->{second}", weights, exact[0]))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == jnp.bfloat16
        # Both the gradient that comes in and the one that goes out have 8 bits, and so have parts of a CPU's sums.
        scale = np.sqrt(np.mean(theirs**2))
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=2**-8, atol=2**-6 * scale)


@pytest.mark.parametrize(("platform", "changes"), [("cpu", True), ("gpu", False), ("tpu", False)])
def test_only_programs_for_a_cpu_are_compiled_with_options(platform, changes):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    assert (compiler_options(mesh) is not None) is changes
    assert compiler_options(None) == compiler_options(SimpleNamespace(devices=np.array(jax.devices())))


def test_a_loop_over_layers_holds_no_wide_copy_of_all_weights():
    """Forward and backward, with what a step of training compiles with."""
    weights, x = jax.ShapeDtypeStruct((32, 256, 256), jnp.bfloat16), jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)

    def value(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].astype(jnp.float32).sum()

    program = jax.jit(jax.grad(value), compiler_options=compiler_options(None)).lower(x, weights).compile()
    assert program.memory_analysis().temp_size_in_bytes < weights.size * 4 / 2
