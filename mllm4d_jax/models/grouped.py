"""Products of rows with the matrices of their groups, as sparse layers need them: one function, and which form runs.

Rows are sorted by group; `sizes` says how many each group has. `jax.lax.ragged_dot` is the reference and runs
everywhere. Of it XLA makes one dense product over all groups on NVIDIA GPUs, seventy times slower at the shapes of
30B-A3B than kernels for cards of the Hopper generation, which are in JAX itself (benchmarks/RESULTS.md, "One GPU").
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp

FORMS = ("xla", "hopper")
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
TILE = 128  # rows, and columns of the result, that a program computes at a time
DEPTH = 64  # of the contracted dimension, that it reads at a time
# The best of those that benchmarks/gpu_sparse.py tries at the shapes of 30B-A3B.
TILES: Mapping[str, int] = MappingProxyType(
    dict(block_m=TILE, block_n=TILE, block_k=DEPTH, max_concurrent_steps=4, grid_block_n=4)
)
log = logging.getLogger(__name__)


def choose_form(device: jax.Device, dtype, widths: Sequence[int]) -> str:
    """Choose the form of the grouped products on a device, which need not be here.

    Where a GPU's activations are 16-bit and it is "xla" after all, a warning says why.

    Args:
      dtype: activation dtype.
      widths: contracted and resulting widths of all products; empty without sparse layers.

    Returns:
      One of `FORMS`.
    """
    if device.platform != "gpu" or not widths or jnp.dtype(dtype) not in HALF:
        return "xla"
    problem = _hopper_problem(device, widths)
    if problem:
        log.warning("products of sparse layers by XLA, many times slower than by kernels for Hopper: %s", problem)
    return "xla" if problem else "hopper"


def grouped_product(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, form: str = "xla") -> jax.Array:
    """Multiply each row with the matrix of its group, accumulating in fp32; differentiable.

    Args:
      rows: [M, K], those of the first group first.
      matrices: [G, K, N] in the dtype of the rows.
      sizes: i32[G], M in all.
      form: from `choose_form`.

    Returns:
      [M, N] in the dtype of the rows.
    """
    if form == "hopper" and len(rows) >= TILE:  # of few rows all forms wait for the matrices, and XLA's least
        return _hopper(rows, matrices, sizes)
    return jax.lax.ragged_dot(rows, matrices, sizes)


def _hopper_problem(device: jax.Device, widths: Sequence[int]) -> str | None:
    """Why the kernels cannot run on a GPU, None if they can."""
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.partition(".")[0] != "9":
        return f"they need a GPU of compute capability 9, and this one has {capability}"
    if odd := [width for width in widths if width % TILE]:
        return f"they need widths that are multiples of {TILE}, and one is {odd[0]}"
    try:
        for kernel, more in zip(_kernels(), ({"transpose_rhs"}, set()), strict=True):
            if missing := {"group_sizes", *TILES, *more} - inspect.signature(kernel).parameters.keys():
                return f"jax {jax.__version__} offers them in another form, without {', '.join(sorted(missing))}"
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} does not offer them ({error})"
    return None


@functools.cache
def _kernels():
    """JAX's kernels, imported when first used: for rows of a group, and for the gradient of the matrices."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot, transposed_ragged_dot_mgpu.transposed_ragged_dot


@jax.custom_vjp
def _hopper(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    return _kernels()[0](rows, matrices, group_sizes=sizes, **TILES)


def _hopper_forward(rows, matrices, sizes):
    return _hopper(rows, matrices, sizes), (rows, matrices, sizes)


def _hopper_backward(kept, pulled):
    """Gradients of both; XLA leaves out that of matrices which are frozen."""
    (rows, matrices, sizes), (product, transposed) = kept, _kernels()
    back = product(pulled, matrices, group_sizes=sizes, transpose_rhs=True, **TILES)
    return back, transposed(rows, pulled, group_sizes=sizes, **TILES), None


_hopper.defvjp(_hopper_forward, _hopper_backward)
