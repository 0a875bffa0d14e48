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
from typing import NamedTuple

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
from mllm4d_jax.models.attention import Backend, choose_backend
from mllm4d_jax.models.config import MoEConfig
from mllm4d_jax.models.grouped import TILES, choose_form, grouped_product
from mllm4d_jax.models.sparse import SparseMLP

MODEL = "30b_a3b"
DECODED = (24, 1)  # tokens of a step of decoding


class SparseWork(NamedTuple):
    """What is multiplied.

    Attributes:
      layer: structure of the model's sparse layer; `weights`: its arrays.
      rows: [M, H], as many as the tokens have experts; `sizes`: i32[E] of each expert.
      flops: that the first product of the layer needs.
    """

    layer: nnx.GraphDef
    weights: dict
    rows: jax.Array
    sizes: jax.Array
    tokens: int
    flops: float

    @property
    def grouped(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.rows, self.weights["gate_up"], self.sizes


def work_of(scale: work.Scale) -> SparseWork:
    """Make the sparse layer of 30B-A3B with random weights, and rows that belong to its experts at random."""
    size = SIZES[MODEL]
    count, top_k, inner, width = *size.experts, size.hidden
    if scale.size == "tiny":
        count, top_k, inner, width = 8, 2, 64, 128
    dtype, tokens = jnp.dtype(scale.dtype), scale.sparse
    layer, shapes = nnx.split(
        nnx.eval_shape(lambda: SparseMLP(width, MoEConfig(count, top_k, inner, (True,)), dtype=dtype, rngs=nnx.Rngs(0)))
    )
    rows = random_arrays(shape_of((tokens * top_k, width), dtype))
    sizes = jnp.asarray(np.random.default_rng(0).multinomial(len(rows), [1 / count] * count), jnp.int32)
    return SparseWork(
        layer, random_arrays(nnx.to_pure_dict(shapes)), rows, sizes, tokens, 4 * len(rows) * width * inner
    )


def products(given: SparseWork) -> None:
    """Report forms of the first grouped product, and a dense product of the same FLOPs."""
    for name, make in GROUPED.items():
        try:
            product = make()
        except ImportError as problem:
            work.report(name, note=str(problem))
            continue
        gradient = squares_pulled(product)
        work.guarded(f"{name}, values", functools.partial(_last_group, name, product, given))
        runs = (("forward", product, 1), ("forward and backward", gradient, 2))
        runs += (("forward and backward, experts trained", squares_pulled(product, (0, 1)), 3),)
        for how, run, times in runs:
            case = f"{name}, {how}"
            work.guarded(case, functools.partial(_timed, case, run, given.grouped, times * given.flops))
    dense = random_arrays(shape_of(given.weights["gate_up"].shape[1:], given.rows.dtype))
    for how, run, times in (("forward", jnp.matmul, 1), ("forward and backward", squares_pulled(jnp.matmul), 2)):
        case = f"dense product, {how}"
        work.guarded(case, functools.partial(_timed, case, run, (given.rows, dense), times * given.flops))


def layers(given: SparseWork) -> None:
    """Report the layer of the model, as a model on this device has it: a gradient, then steps of decoding."""
    widths = given.weights["gate_up"].shape[1], given.weights["down"].shape[1]
    chosen = choose_backend("xla", given.rows.dtype, grouped_widths=widths)

    def forward(x, weights, backend=chosen):
        return nnx.merge(given.layer, weights)(x[None], jnp.ones((1, len(x)), bool), backend)[0]

    case = f"layer of the model ({chosen.grouped}), forward and backward"
    # Twice for the gradient of the rows; the second product is half as much again.
    run = jax.grad(lambda *args: jnp.sum(jnp.square(forward(*args).astype(jnp.float32))))
    work.guarded(case, lambda: _timed(case, run, (given.rows[: given.tokens], given.weights), 3 * given.flops))
    for tokens in DECODED:
        for backend in dict.fromkeys((chosen, Backend("xla"))):
            case = f"layer of the model ({backend.grouped}), {tokens} tokens, forward"
            run = functools.partial(forward, backend=backend)
            flops = 3 * given.flops * tokens / given.tokens / 2
            arguments = (given.rows[:tokens], given.weights)
            work.guarded(case, functools.partial(_timed, case, run, arguments, flops))


def tiles(given: SparseWork, candidates: str) -> None:
    """Report the product for Hopper by sizes of its tiles: BLOCK_M x BLOCK_N x BLOCK_K x STEPS x GRID_BLOCK_N."""
    for candidate in candidates.split(","):
        sizes = dict(zip(TILES, map(int, candidate.split("x")), strict=True))
        for back in (False, True):
            run = functools.partial(_tiled, sizes, back)
            rows, matrices, groups = given.grouped
            if back:
                rows = random_arrays(shape_of((len(rows), matrices.shape[2]), rows.dtype))
            case = f"tiles {candidate}{', backward' if back else ''}"
            work.guarded(case, functools.partial(_timed, case, run, (rows, matrices, groups), given.flops))


def _tiled(sizes: Mapping[str, int], back: bool, rows, matrices, groups) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot(rows, matrices, group_sizes=groups, transpose_rhs=back, **sizes)


def _hopper_product():
    if choose_form(jax.devices()[0], jnp.bfloat16, (128,)) != "hopper":
        raise ImportError("kernels for GPUs of compute capability 9")
    return functools.partial(grouped_product, form="hopper")


def _tokamax_product():
    import tokamax

    return tokamax.ragged_dot


# Forms of the grouped product, by how each is got.
GROUPED: Mapping[str, Callable[[], Callable]] = MappingProxyType(
    {
        "jax.lax.ragged_dot": lambda: jax.lax.ragged_dot,
        "kernels for Hopper": _hopper_product,
        "tokamax.ragged_dot": _tokamax_product,
    }
)


def _last_group(name: str, product, given: SparseWork) -> None:
    """Report how far values and gradients of the last group are from a plain product's, of the largest value."""
    size = int(given.sizes[-1])
    plain = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    last = given.rows[-size:], given.grouped[1][-1]
    found = jax.jit(product)(*given.grouped)[-size:], *jax.jit(squares_pulled(product, (0, 1)))(*given.grouped)
    wanted = plain(*last), *squares_pulled(plain, (0, 1))(*last)
    gaps = {}
    for what, x, y in zip(("gap", "gradient_gap", "matrix_gradient_gap"), found, wanted, strict=True):
        x, y = (t.astype(jnp.float32) for t in ((x[-1] if x.ndim > y.ndim else x[-size:]), y))
        gaps[what] = float(jnp.abs(x - y).max() / jnp.abs(y).max())
    work.report(f"{name}, values", **gaps)


def squares_pulled(product, of: int | tuple[int, ...] = 0):
    """The gradient of the sum of squares of a product with respect to its rows, or to what else is numbered."""
    return jax.grad(lambda *args: jnp.sum(jnp.square(product(*args).astype(jnp.float32))), of)


def _timed(case: str, function, arguments: tuple, flops: float) -> None:
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - started
    seconds = work.seconds_of(lambda: compiled(*arguments), jax.block_until_ready, 5)
    work.report(case, **rate(flops, seconds), compile_s=compile_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tiles", default="", help="only try sizes of tiles, such as 128x128x64x4x1,64x256x64x4x1")
    args = parser.parse_args()
    given = work_of(work.scale_of(args.tiny, gpu=jax.default_backend() == "gpu"))
    if args.tiles:
        tiles(given, args.tiles)
    else:
        products(given)
        layers(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
