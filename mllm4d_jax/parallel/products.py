"""Matrix products of 16-bit operands, summed in float32, and with them the logits of a few positions at a time.

Accelerators have such products. XLA widens the operands on a CPU, which `compiler_options` keeps from costing memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm4d_jax.parallel.rules import BATCH_AXES, batch_shards, constrain, constrain_rows

_VOCABULARY_AXES = ("tensor", "fsdp")  # mesh axes over which the head's vocabulary is split here

# (logits f32[B, m, V], further arrays [B, m]) -> arrays [B, m]
OfLogits = Callable[..., tuple[jax.Array, ...]]


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
    """Return the options with which `jax.jit` compiles programs that hold weights; None for the compiler's own.

    Where XLA has no 16-bit form of an operation on a CPU, it widens the operands. Widened weights are the same in every
    layer and for every token, so a pass moves the widening out of those loops (with jax below 0.12): all weights once
    more, at twice the size, written and read for every token. Without it a layer at a time is widened where it is used.

    Args:
      mesh: devices that the program is for, whether they are here or not; None for this process's.
    """
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if _platform(mesh) == "cpu" else None


def learning_options(mesh: Mesh | None) -> dict[str, str | bool] | None:
    """Return `compiler_options` of programs with a backward pass.

    On a GPU their large products are left to the library. To time kernels of XLA's own against it takes a minute of
    each first compilation, and a plan that has no device to time them on could not tell the program's memory.

    Args:
      mesh: as for `compiler_options`.
    """
    return {"xla_gpu_enable_triton_gemm": False} if _platform(mesh) == "gpu" else compiler_options(mesh)


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def einsum_f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays with sums and result in float32.

    Accelerators multiply 16-bit operands and sum in float32 at once. XLA has no such product for every shape on a CPU
    and stops when it meets one; there the operands are widened first, which gives the same numbers.
    """

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == b.dtype == jnp.float32:
        return jnp.einsum(subscripts, a, b)
    # Decided when the program is lowered: one compiled ahead of time for another device gets that device's form.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=mixed_product(subscripts))


def mixed_product(subscripts: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return `einsum_f32` of 16-bit operands as an accelerator computes it, backward too.

    The gradient of the result is rounded to the operands' dtype, as are those that come out. In float32 it would have
    the other operand widened and the product computed at half the speed: for logits a copy of the whole head, written
    and read for every chunk (seen in programs for an H100).
    """

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

    def backward(operands: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda a, b: jnp.einsum(subscripts, a, b), *operands)[1](grad.astype(operands[0].dtype))

    found = jax.custom_vjp(product)
    found.defvjp(lambda a, b: (product(a, b), (a, b)), backward)
    return found


def over_positions(
    function: OfLogits,
    hidden: jax.Array,
    head: jax.Array,
    others: Sequence[jax.Array],
    *,
    chunk: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, ...]:
    """Applies a function of the logits `hidden @ head` (float32) to about `chunk` positions at a time.

    A chunk's logits are computed again in the backward pass, so that at most one `[chunk, V]` array exists in either
    direction, never one of all positions. On a mesh the head is split over its vocabulary by the axes tensor and fsdp,
    and each device computes its part of the logits for all rows of its group of devices; only sums over the vocabulary
    are exchanged. With rows and head split as they arrive, XLA would gather the whole head.

    Args:
      function: sees some positions of all rows. It should use sums and maxima over the vocabulary, not gathers or an
        argmax: they stay local when the vocabulary is split.
      hidden: [B, M, H] final hidden states, in the activation dtype.
      head: [H, V] output projection.
      others: arrays [B, M] that belong to the positions; padded with zeros where M is not a multiple of a chunk.
      chunk: positions whose logits exist at a time in a group of devices that together hold the head; at least one of
        every row.
      mesh: devices over which rows and head are split; None for one.

    Returns:
      What the function gives, as arrays [B, M].
    """
    rows, m = hidden.shape[:2]
    groups = _groups(mesh, rows)
    together = rows // math.prod(mesh.shape[axis] for axis in groups) if mesh is not None else rows
    each = min(m, max(1, chunk // together))
    padding = -m % each
    head = constrain(head, mesh, None, _VOCABULARY_AXES).astype(hidden.dtype)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return constrain_rows(x.reshape(rows, -1, each, *x.shape[2:]).swapaxes(0, 1), mesh, 1)

    @jax.checkpoint
    def body(_, piece: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        hidden, *others = (constrain(x, mesh, groups or None) for x in piece)
        logits = einsum_f32("bmh,hv->bmv", hidden, head)
        logits = constrain(logits, mesh, groups or None, None, _VOCABULARY_AXES)
        return None, tuple(function(logits, *others))

    _, out = jax.lax.scan(body, None, (chunks(hidden), *map(chunks, others)))
    return tuple(x.swapaxes(0, 1).reshape(rows, -1)[:, :m] for x in out)


def pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logits of the targets: [..., V] and i32[...] -> [...], as a masked sum."""
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def _groups(mesh: Mesh | None, rows: int) -> tuple[str, ...]:
    """Mesh axes that split the rows and not the vocabulary."""
    if mesh is None or rows % batch_shards(mesh):
        return ()
    return tuple(axis for axis in BATCH_AXES if axis not in _VOCABULARY_AXES)
