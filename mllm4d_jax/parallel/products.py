"""Matrix products of 16-bit operands, summed and returned in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum_f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays with sums and result in float32.

    Accelerators multiply 16-bit operands and sum in float32 at once. XLA has no such product for every shape on a CPU
    and stops when it meets one; there the operands are widened first, which gives the same numbers.
    """

    def mixed(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == b.dtype == jnp.float32:
        return jnp.einsum(subscripts, a, b)
    # Decided when the program is lowered: one compiled ahead of time for another device gets that device's form.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=mixed)
