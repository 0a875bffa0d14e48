"""Part "sparse" of gpu.py: the sparse layer of 30B-A3B and forms of its grouped product, against the FLOPs they need.

Each row is multiplied with the matrix of its expert. A dense product of all rows with one matrix has the same FLOPs.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import gpu_work as work
from benchmarks.gpu_ours import rate, shape_of
from benchmarks.random_weights import random_arrays
from configs.published import SIZES
from mllm4d_jax.models.config import MoEConfig
from mllm4d_jax.models.layers import SparseMLP

MODEL = "30b_a3b"


def sparse(scale: work.Scale) -> None:
    """Report the sparse layer of 30B-A3B, forms of its grouped product, and a dense product of the same FLOPs."""
    size = SIZES[MODEL]
    count, top_k, inner, width = *size.experts, size.hidden
    if scale.size == "tiny":
        count, top_k, inner, width = 8, 2, 64, 128
    dtype, tokens = jnp.dtype(scale.dtype), scale.sparse
    layer, shapes = nnx.split(
        nnx.eval_shape(lambda: SparseMLP(width, MoEConfig(count, top_k, inner, (True,)), dtype=dtype, rngs=nnx.Rngs(0)))
    )
    weights = random_arrays(nnx.to_pure_dict(shapes))
    rows, dense = (random_arrays(shape_of(s, dtype)) for s in ((tokens * top_k, width), (width, 2 * inner)))
    sizes = np.random.default_rng(0).multinomial(len(rows), [1 / count] * count)
    grouped, flops = (rows, weights["gate_up"], jnp.asarray(sizes, jnp.int32)), 2 * len(rows) * width * 2 * inner

    def squares(x, weights):
        y = nnx.merge(layer, weights)(x[None], jnp.ones((1, tokens), bool))[0]
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    for name, make in GROUPED.items():
        try:
            product = make()
        except ImportError as problem:
            work.report(name, note=str(problem))
            continue
        gradient = squares_pulled(product)
        check = functools.partial(_last_group, name, product, gradient, grouped, int(sizes[-1]))
        work.guarded(f"{name}, values", check)
        for how, run, times in (("forward", product, 1), ("forward and backward", gradient, 2)):
            case = f"{name}, {how}"
            work.guarded(case, functools.partial(_timed, case, run, grouped, times * flops))
    for how, run, times in (("forward", jnp.matmul, 1), ("forward and backward", squares_pulled(jnp.matmul), 2)):
        case = f"dense product, {how}"
        work.guarded(case, functools.partial(_timed, case, run, (rows, dense), times * flops))
    case = "layer of the model, forward and backward"  # twice for the gradient; up and gate are half as much again
    work.guarded(case, lambda: _timed(case, jax.grad(squares), (rows[:tokens], weights), 3 * flops))


def _hopper_product():
    """The kernel for Hopper that comes with JAX, with the gradient of the rows: weights are frozen."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    if jax.default_backend() != "gpu":
        raise ImportError("a kernel for GPUs")
    tiles = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=1)

    @jax.custom_vjp
    def product(rows, matrices, sizes):
        return ragged_dot_mgpu.ragged_dot(rows, matrices, group_sizes=sizes, **tiles)

    def backward(kept, pulled):
        matrices, sizes = kept
        back = ragged_dot_mgpu.ragged_dot(pulled, matrices, group_sizes=sizes, transpose_rhs=True, **tiles)
        return back, None, None

    product.defvjp(lambda rows, *rest: (product(rows, *rest), rest), backward)
    return product


def _tokamax_product():
    import tokamax

    return tokamax.ragged_dot


# Forms of the grouped product, by how each is got.
GROUPED: Mapping[str, Callable[[], Callable]] = MappingProxyType(
    {
        "jax.lax.ragged_dot": lambda: jax.lax.ragged_dot,
        "Pallas kernel for Hopper": _hopper_product,
        "tokamax.ragged_dot": _tokamax_product,
    }
)


def _last_group(name: str, product, gradient, grouped: tuple, size: int) -> None:
    """Report how far values and gradient of the last group's rows are from a plain product's, of the largest value."""
    rows, matrices, sizes = grouped
    plain = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    gaps = {}
    for what, run, wanted in (
        ("gap", product, plain(rows[-size:], matrices[-1])),
        ("gradient_gap", gradient, squares_pulled(plain)(rows[-size:], matrices[-1])),
    ):
        found, wanted = (x.astype(jnp.float32) for x in (jax.jit(run)(rows, matrices, sizes)[-size:], wanted))
        gaps[what] = float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())
    work.report(f"{name}, values", **gaps)


def squares_pulled(product):
    """The gradient of the sum of squares of a product with respect to its rows."""
    return jax.grad(lambda rows, *rest: jnp.sum(jnp.square(product(rows, *rest).astype(jnp.float32))))


def _timed(case: str, function, arguments: tuple, flops: float) -> None:
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - started
    seconds = work.seconds_of(lambda: compiled(*arguments), jax.block_until_ready, 5)
    work.report(case, **rate(flops, seconds), compile_s=compile_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    sparse(work.scale_of(args.tiny, gpu=jax.default_backend() == "gpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
