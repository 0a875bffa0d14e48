"""One attention function with segment ids, three backends; rows with a shared prefix are in `shared_prefix.py`.

A query sees a key when both carry the same segment id and, if causal, the key does not come later. Segment ids are
mandatory: packing, padding and the one-frame-only rule of the vision tower are all expressed by them, so no call site
can forget a mask. Id 0 is padding by convention; padded queries see padded keys, which keeps their softmax finite.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm4d_jax.models.grouped import HALF, choose_form
from mllm4d_jax.parallel.products import einsum_f32

BACKENDS = ("auto", "xla", "cudnn", "splash")
log = logging.getLogger(__name__)

LOWEST = float(jnp.finfo(jnp.float32).min)  # score of what is not seen
QUERY_BLOCK = 512  # queries whose scores the xla form holds at a time on an accelerator


class BackendError(ValueError):
    """The requested attention backend cannot run here. The message says why and what to use."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """How what has several forms is computed: attention, and the products of sparse layers."""

    name: str  # "xla", "cudnn" or "splash"
    mesh: Mesh | None = None  # over which kernels, which XLA cannot split by itself, are split
    grouped: str = "xla"  # form of the sparse layers' products, see `grouped.grouped_product`
    query_block: int | None = None  # queries of rows whose scores exist at a time in the xla form; None for all
    unroll: bool = False  # the decoder's layers are compiled one by one, see `layers.scan_layers`
    interpret: bool = False  # run the TPU kernel in the Pallas interpreter (tests on CPU)

    def __str__(self) -> str:
        return self.name


def choose_backend(
    requested: str, dtype, mesh: Mesh | None = None, head_dim: int = 128, grouped_widths: Sequence[int] = ()
) -> Backend:
    """Choose the attention backend and the form of grouped products.

    They are for the devices of `mesh`, or of this process without one. The mesh may be of devices that are not here: a
    program compiled ahead of time for a TPU or GPU gets its kernel.

    Args:
      requested: "xla", "cudnn" or "splash" to insist; "auto" is splash on TPU, cudnn on GPUs where it can run (which
        is compute capability 8.0 or more, 16-bit activations, and a release of JAX whose interface is known), xla
        elsewhere. Where a GPU's activations are 16-bit and it is xla after all, a warning says why.
      dtype: activation dtype.
      head_dim: largest head size of the model.
      grouped_widths: of its sparse layers, see `grouped.choose_form`.

    Raises:
      BackendError: unknown name, or a backend that this platform or dtype cannot run.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform, name = device.platform, requested
    here = f"this process runs on {platform}: use 'auto' or 'xla'"
    problem = _cudnn_problem(device, dtype, head_dim) if platform == "gpu" and requested in ("auto", "cudnn") else None
    if requested == "auto":
        name = {"tpu": "splash", "gpu": "xla" if problem else "cudnn"}.get(platform, "xla")
        if problem and _half(dtype):
            log.warning("attention by XLA, several times slower than by cuDNN: %s", problem)
    elif requested not in BACKENDS:
        raise BackendError(f"unknown attention backend {requested!r} (known: {', '.join(BACKENDS)})")
    elif requested == "splash" and platform != "tpu":
        raise BackendError(f"attention='splash' is a TPU kernel and {here}")
    elif requested == "cudnn" and platform != "gpu":
        raise BackendError(f"attention='cudnn' needs an NVIDIA GPU and {here}")
    elif problem:
        raise BackendError(f"attention='cudnn': {problem}. Use 'auto' or 'xla'")
    # The scores of a whole row fit into a CPU's memory, and one large product is faster there than many small ones.
    return Backend(
        name,
        mesh,
        grouped=choose_form(device, dtype, grouped_widths),
        query_block=None if platform == "cpu" else QUERY_BLOCK,
        unroll=platform == "gpu",
    )


def _half(dtype) -> bool:
    return jnp.dtype(dtype) in HALF


def _cudnn_problem(device: jax.Device, dtype, head_dim: int) -> str | None:
    """Why cuDNN's kernels cannot run on a GPU, None if they can."""
    from mllm4d_jax.models import cudnn

    if not _half(dtype):
        return f"it needs bfloat16 or float16 activations, got {jnp.dtype(dtype)}"
    capability = _compute_capability(device)
    if capability < 8.0:
        return f"it needs a GPU of compute capability 8.0 or more, and this one has {capability}"
    if head_dim > cudnn.largest_head_dim(capability):
        return f"heads of {head_dim} are larger than the {cudnn.largest_head_dim(capability)} that it takes here"
    return cudnn.problem()


def _compute_capability(device: jax.Device) -> float:
    return float(getattr(device, "compute_capability", 0.0))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: jax.Array,
    causal: bool,
    backend: Backend,
    lone: bool = False,
) -> jax.Array:
    """Softmax attention within segments; scale head_dim^-0.5, softmax in fp32.

    Args:
      q: [B, S, N, d].
      k, v: [B, S, K, d] with N a multiple of K; key head j serves query heads j*N/K .. (j+1)*N/K - 1.
      segments: i32[B, S].
      causal: position s sees positions t <= s.
      backend: from `choose_backend`.
      lone: the caller knows that each sequence is one segment from its first position on, with padding behind. cudnn
        then needs no mask in memory; what padded queries give is another, as meaningless, value.

    Returns:
      [B, S, N, d] in the dtype of q.
    """
    if backend.name == "splash":
        from mllm4d_jax.models.splash import splash_attention

        return splash_attention(q, k, v, segments, causal=causal, mesh=backend.mesh, interpret=backend.interpret)
    if backend.name == "cudnn":
        from mllm4d_jax.models.flash import Sequences, flash_attention

        return flash_attention(q, k, v, segments, Sequences(causal, lone), backend.mesh)
    mask = segments[:, :, None] == segments[:, None, :]  # bool[B,S,S]
    if causal:
        mask &= jnp.tril(jnp.ones(mask.shape[1:], bool))
    return masked_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Reference formula; heads come before positions in k and v.

    Args:
      q: [B, S, N, d]; k, v: [B, K, T, d]; mask: bool[B, S, T], True where visible.

    Returns:
      [B, S, N, d] in the dtype of q.
    """
    b, s, n, d = q.shape
    grouped = q.reshape(b, s, k.shape[1], n // k.shape[1], d)
    scores = einsum_f32("bskgd,bktd->bkgst", grouped, k) * d**-0.5
    scores = jnp.where(mask[:, None, None], scores, LOWEST)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgst,bktd->bskgd", probs, v).reshape(b, s, n, d)
