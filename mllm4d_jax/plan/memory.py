"""Memory of a step on GPUs, reckoned from the shapes without compiling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import ml_collections
from flax import nnx
from jax.sharding import AbstractMesh

from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.split import trained
from mllm4d_jax.parallel.chips import CHIPS, GIB
from mllm4d_jax.parallel.mesh import AXES, make_mesh
from mllm4d_jax.parallel.rules import partition_spec
from mllm4d_jax.plan.compile import itemsize
from mllm4d_jax.plan.step import PlanJob, abstract_model

Parameters = tuple[tuple[str, tuple[int, ...], tuple], ...]

USABLE = 0.9  # a GPU also holds the CUDA context, libraries' workspaces and the allocator's gaps
GPUS: Mapping[str, int] = MappingProxyType({name: chip.hbm for name, chip in CHIPS.items() if chip.reckoned})


def by_kind(
    job: PlanJob, rows: float, shards: int, remat: str, tensor: int = 1, table: Parameters | None = None
) -> dict[str, float]:
    """Bytes on one device.

    Args:
      rows: on this device.
      shards: devices along the axis fsdp; what its rules do not split is whole on each.
      remat: "none", "full" or "dots".
      tensor: devices along the axis tensor, which also split what lies between the projections of a layer.
      table: from `parameter_table`, to make it once for several calls.

    Weights in the run's dtype; trained parameters, their gradients and two moments in fp32. Kept for backward, per
    token: one hidden state a layer with "full"; with "dots" also the results of the layer's matrix products; with
    "none" also what lies between them, among it the fp32 statistics of the norms. One layer's worth of the latter is
    alive while it is computed, whatever the policy, and so are one gathered layer of weights and the head split over
    its vocabulary (when sharded), a chunk of logits twice in fp32 and the vision tower's widest activations.
    """
    c, t, s = job.config, job.model.text, job.sizes
    item = itemsize(c)
    frozen, trainable, layer = parameters(job, table or parameter_table(job.config, job.model), shards, tensor)
    tokens = rows * s.layout.size
    q, k = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    inner = t.moe.intermediate_size * t.moe.top_k if t.moe else t.intermediate_size
    dots = (2 * q + 2 * k + 2 * inner) / tensor + 2 * t.hidden_size
    # the last two: fp32 halves of the norms
    between = dots + (q + k + inner) / tensor + 4 * t.hidden_size + 2 * t.hidden_size
    kept = t.hidden_size + (dots if remat == "dots" else between if remat == "none" else 0)
    v, patches = job.model.vision, rows * s.frames * s.frame_patches
    chunk = min(c.train.loss_chunk, rows * shards * s.supervised)
    head = t.hidden_size * t.vocab_size * item
    return {
        "weights": frozen * item,
        "adapter, gradient, optimiser": 4 * 4 * trainable,
        "batch": rows * s.frames * s.frame_patches * (v.patch_dim + 9) * 4 + tokens * 24,
        "kept activations": tokens * t.num_layers * kept * item,
        "working activations": tokens * (between + len(v.deepstack) * t.hidden_size) * item,
        "gathered layer": 2 * layer / tensor * item if shards > 1 else 0,
        "vision": patches * (v.hidden_size * (5 + len(v.deepstack)) + v.intermediate_size) * item,
        "logits": 2 * 4 * chunk * t.vocab_size / shards / tensor + 2 * rows * s.supervised * t.hidden_size * item,
        "exchanged head": 2 * head / shards / tensor if shards > 1 else 0,
    }


def parameter_table(config: ml_collections.ConfigDict, sizes: ModelConfig) -> Parameters:
    """(name, shape, logical axes) of every parameter of the run's model."""
    model = abstract_model(config, sizes, make_mesh({"data": 1}, jax.devices("cpu")[:1]))
    return tuple(
        ("/".join(map(str, path)), variable.get_value().shape, variable.get_metadata("logical_axes"))
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    )


def parameters(job: PlanJob, table: Parameters, shards: int, tensor: int = 1) -> tuple[int, int, int]:
    """(frozen, trained) parameters on one device, and those of one decoder layer, whole."""
    mesh = AbstractMesh((1, shards, tensor), AXES)
    frozen = trainable = layer = 0
    for name, shape, axes in table:
        split = jax.tree.leaves(tuple(partition_spec(axes, shape, mesh)))
        size = math.prod(shape) // math.prod(mesh.shape[axis] for axis in split)
        if trained(name, tuple(job.config.train.trainable)):
            trainable += size
        else:
            frozen += size
        layer += math.prod(shape[1:]) if name.startswith("text/stacks/") else 0
    return frozen, trainable, layer


def record(job: PlanJob) -> list[dict[str, Any]]:
    """For 1 and 8 devices of each kind: bytes by kind with the configured rows, and the most rows that fit."""
    out = []
    for devices in (1, 8):
        rows = -(-job.rows // devices)
        for policy in ("full", "dots", "none"):
            kinds = by_kind(job, rows, devices, policy)
            one, two = (sum(by_kind(job, r, devices, policy).values()) for r in (1, 2))
            most = {name: max(0, math.floor(1 + (USABLE * hbm - one) / (two - one))) for name, hbm in GPUS.items()}
            out.append(
                dict(
                    devices=devices, rows=rows, remat=policy, bytes=kinds, total=sum(kinds.values()), largest_rows=most
                )
            )
    return out


def table(job: PlanJob) -> str:
    """Markdown: a line for each number of devices and remat policy."""
    lines = [
        f"Reckoned, not compiled; the devices are those of mesh.fsdp. {USABLE:.0%} of the memory is counted as usable.",
        "",
        "| devices | remat | rows per device | weights | adapter, gradient, optimiser | activations | rest | GiB | "
        + " | ".join(f"most rows, {name}" for name in GPUS)
        + " |",
        "|---:|---|" + "---:|" * (6 + len(GPUS)),
    ]
    for r in record(job):
        b = {kind: n / GIB for kind, n in r["bytes"].items()}
        activations = b["kept activations"] + b["working activations"] + b["vision"]
        rest = b["batch"] + b["gathered layer"] + b["logits"] + b["exchanged head"]
        lines.append(
            f"| {r['devices']} | {r['remat']} | {r['rows']} | {b['weights']:.2f} | "
            f"{b['adapter, gradient, optimiser']:.2f} | {activations:.2f} | {rest:.2f} | {r['total'] / GIB:.2f} | "
            + " | ".join(str(n) for n in r["largest_rows"].values())
            + " |"
        )
    return "\n".join(lines)
