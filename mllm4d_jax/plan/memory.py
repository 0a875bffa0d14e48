"""Memory of a step, reckoned from the shapes without compiling: of GPUs, and to choose settings that may fit TPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import ml_collections
from flax import nnx
from jax.sharding import AbstractMesh

from mllm4d_jax.grpo.settings import completions_per_row, division_problems
from mllm4d_jax.grpo.setup import make_ladder
from mllm4d_jax.models.layers import REMAT
from mllm4d_jax.models.split import trained
from mllm4d_jax.parallel.chips import CHIPS, GIB
from mllm4d_jax.parallel.mesh import AXES, MeshError, make_mesh, mesh_shape
from mllm4d_jax.parallel.rules import partition_spec
from mllm4d_jax.plan.job import GrpoJob, PlanError, PlanJob
from mllm4d_jax.rows.rows import RowSizes
from mllm4d_jax.run.build import abstract_model
from mllm4d_jax.run.fitting import remat_forms
from mllm4d_jax.run.optimizer import OPTIMIZERS

Memory = dict[str, dict[str, float]]  # bytes on a device by phase and kind
Reckoned = tuple[int, Memory, dict[str, int]]  # rows of a GPU or completions of a row, bytes, most that fits by GPU
Parameters = tuple[tuple[str, tuple[int, ...], tuple], ...]

GPUS: Mapping[str, int] = MappingProxyType({name: chip.usable for name, chip in CHIPS.items() if chip.reckoned})
MARGIN = 0.9  # share of the usable memory up to which reckoned settings are proposed
FAR = 1.3  # times the usable memory: above it nothing is compiled to see whether it fits
COPY = "sampler's frozen"  # the base weights on the sampling mesh


def learning(
    job: PlanJob, sizes: RowSizes, rows: float, shape: Mapping[str, int], remat: str, table: Parameters
) -> dict[str, float]:
    """Return the bytes on one device of a step with a gradient, by kind.

    Args:
      sizes: of a row.
      rows: on this device.
      shape: devices along the axes data, fsdp and tensor; what their rules do not split is whole on each.
      remat: one of `models.layers.REMAT`.
      table: from `parameter_table`.

    Weights in the run's dtype; trained parameters, their gradients and their moments in fp32. Kept for backward, per
    token: one hidden state a layer with "full"; with "dots" also the results of the layer's matrix products, with
    "dots_except_mlp" all but those into the inner width; with "none" also what lies between them, among it the fp32
    statistics of the norms. One layer's worth of the latter is
    alive while it is computed, whatever the policy, and so are one gathered layer of weights and the head split over
    its vocabulary (when sharded), a chunk of logits twice in fp32 and the vision tower's widest activations.
    """
    c, t, item = job.config, job.model.text, job.item
    shards, tensor = shape["fsdp"], shape["tensor"]
    frozen, trainable, layer = parameters(job, table, shards, tensor)
    tokens = rows * sizes.layout.size
    q, k = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    inner = t.moe.intermediate_size * t.moe.top_k if t.moe else t.intermediate_size
    dots = (2 * q + 2 * k + 2 * inner) / tensor + 2 * t.hidden_size
    some = dots - 2 * inner / tensor
    # the last two: fp32 halves of the norms
    between = dots + (q + k + inner) / tensor + 4 * t.hidden_size + 2 * t.hidden_size
    kept = t.hidden_size + {"none": between, "dots": dots, "dots_except_mlp": some, "full": 0}[remat]
    v, patches = job.model.vision, rows * sizes.frames * sizes.frame_patches
    chunk = min(c.train.loss_chunk, rows * shards * sizes.supervised)
    head = t.hidden_size * t.vocab_size * item
    return {
        "weights": frozen * item,
        "adapter, gradient, optimiser": 4 * (2 + OPTIMIZERS[c.optim.name] + (c.train.accumulation > 1)) * trainable,
        "batch": patches * (v.patch_dim + 9) * 4 + tokens * 24,
        "kept activations": tokens * t.num_layers * kept * item,
        "working activations": tokens * (between + len(v.deepstack) * t.hidden_size) * item,
        "gathered layer": 2 * layer / tensor * item if shards > 1 else 0,
        "vision": patches * (v.hidden_size * (5 + len(v.deepstack)) + v.intermediate_size) * item,
        "logits": 2 * 4 * chunk * t.vocab_size / shards / tensor + 2 * rows * sizes.supervised * t.hidden_size * item,
        "exchanged head": 2 * head / shards / tensor if shards > 1 else 0,
    }


def rollout_memory(job: GrpoJob, shape: Mapping[str, int], remat: str, table: Parameters) -> Memory:
    """Return the bytes on one device while sampling and while learning, with completions as long as the cap, by kind.

    The reference is a further tree of what is trained. While sampling there are the caches, before a branch's last
    growth the smaller one besides, and the branches' logits thrice in fp32. Base weights that are laid out a second
    time (rollout.tensor) are there all the time.
    """
    c, item, t, v = job.rollout, job.item, job.model.text, job.model.vision
    sizes, rows = job.row_sizes(c.max_new_tokens), job.rows / (shape["data"] * shape["fsdp"])
    kinds = learning(job, sizes, rows, shape, remat, table)
    _, trainable, _ = parameters(job, table, shape["fsdp"], shape["tensor"])
    tensor = c.tensor or shape["tensor"]
    data = math.prod(shape.values()) // tensor
    frozen, adapter, _ = parameters(job, table, 1, tensor)
    # vision features, on a device that holds them whole
    features = c.prompts * job.sizes.frames * job.sizes.frame_patches // v.merge_size**2
    kept = {
        "weights": kinds.pop("weights"),
        COPY: frozen * item if c.tensor else 0,
        "reference": 4 * trainable * job.reference,
        "features": features * v.out_hidden_size * (1 + len(v.deepstack)) * item,
    }
    rows, split = job.sampled(data) // data, tensor if t.num_kv_heads % tensor == 0 else 1
    slots = [slots for slots, _ in job.rungs(make_ladder(job.config, data), c.max_new_tokens)] or [1]
    smaller = slots[-2] if len(slots) > 1 else 0
    sampling = {
        "adapter, optimiser": 4 * (1 + OPTIMIZERS[job.config.optim.name]) * trainable
        + (4 * adapter if c.tensor else 0),
        "prompt cache": job.cache_bytes(rows, job.sizes.prefix) / split,
        "branch cache": job.cache_bytes(rows, slots[-1], c.completions) / split,
        "cache before growth": job.cache_bytes(rows, smaller, c.completions) / split,
        "logits": 3 * 4 * rows * c.completions * t.vocab_size / tensor,
    }
    return {"sampling": kept | sampling, "learning": kept | kinds}


def policies(job: PlanJob, platform: str, devices: int, limit: int) -> tuple[str, ...]:
    """Return what `model.remat` may come to on so many devices, fastest first: those that are not far from fitting.

    Args:
      platform: of the devices.
      limit: bytes of a device that programs can have.
    """
    *others, last = remat_forms(job.config.model.remat, platform)
    try:
        shape = mesh_shape(dict(job.config.mesh), devices)
    except MeshError:
        return (last,)
    table = parameter_table(job) if others else ()

    def far(remat: str) -> bool:
        if isinstance(job, GrpoJob):
            return needed(rollout_memory(job, shape, remat, table)) > FAR * limit
        rows = -(-job.rows // (shape["data"] * shape["fsdp"]))
        return sum(learning(job, job.sizes, rows, shape, remat, table).values()) > FAR * limit

    return (*(remat for remat in others if not far(remat)), last)


def needed(phases: Memory) -> float:
    """Return the bytes of the phase that wants most."""
    return max(sum(kinds.values()) for kinds in phases.values())


def divisors(n: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def parameter_table(job: PlanJob) -> Parameters:
    """Return (name, shape, logical axes) of every parameter of the run's model."""
    model = abstract_model(job.config, job.model, make_mesh({"data": 1}, jax.devices("cpu")[:1]))
    return tuple(
        ("/".join(map(str, path)), variable.get_value().shape, variable.get_metadata("logical_axes"))
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    )


def parameters(job: PlanJob, table: Parameters, shards: int, tensor: int = 1) -> tuple[int, int, int]:
    """Return (frozen, trained) parameters on one device, and those of one decoder layer, whole."""
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


def gpu_record(job: PlanJob) -> list[dict[str, Any]]:
    """Return for 1 and 8 GPUs and each remat policy: bytes by phase and kind as configured, and the most that fits.

    That are rows of a device in fine-tuning, prompts of a step in reinforcement learning ("rows" are then the
    completions of a row).
    """
    table, reckon, out = parameter_table(job), _gpu_rollouts if isinstance(job, GrpoJob) else _gpu_steps, []
    for devices in (1, 8):
        for remat in reversed(REMAT):
            shape = {"data": 1, "fsdp": devices, "tensor": 1}
            rows, phases, most = reckon(job, shape, remat, table)
            same = dict(devices=devices, remat=remat, rows=rows)
            out.append(same | dict(bytes=phases, total=needed(phases), largest=most))
    return out


def _gpu_steps(job: PlanJob, shape: Mapping[str, int], remat: str, table: Parameters) -> Reckoned:
    rows = -(-job.rows // shape["fsdp"])
    phases, one, two = ({"step": learning(job, job.sizes, n, shape, remat, table)} for n in (rows, 1, 2))
    return rows, phases, _largest(1, one, two)


def _gpu_rollouts(job: GrpoJob, shape: Mapping[str, int], remat: str, table: Parameters) -> Reckoned:
    """Reckon with rows of as many completions as leave each GPU one, and weights that they share while sampling."""
    c, heads, devices = job.rollout, job.model.text.num_kv_heads, shape["fsdp"]
    per_row = max([1, *(n for n in divisors(c.completions) if not c.prompts * (c.completions // n) % devices)])
    share = max(t for t in divisors(devices) if not heads % t) if devices > 1 else 0
    planned = job.with_settings({"learner.completions_per_row": per_row, "rollout.tensor": share})
    phases = rollout_memory(planned, shape, remat, table)
    twice = rollout_memory(planned.with_settings({"rollout.prompts": 2 * c.prompts}), shape, remat, table)
    return per_row, phases, _largest(c.prompts, phases, twice)


def _largest(count: int, one: Memory, two: Memory) -> dict[str, int]:
    """Return how many fit each GPU in every phase, from the bytes of `count` and those of twice as many."""
    lines = [(sum(one[phase].values()), sum(two[phase].values())) for phase in one]

    def most(limit: float) -> int:
        return min(math.floor(count + count * (limit - first) / max(second - first, 1.0)) for first, second in lines)

    return {name: max(0, most(limit)) for name, limit in GPUS.items()}


def choose(job: GrpoJob, devices: int, limit: int, hosts: int = 1) -> tuple[GrpoJob, str]:
    """Return the job under settings that are reckoned to fit the devices, and a note on what has to be set for that.

    The config's own are taken where they can work; the note is '' then. `hosts`: that have as many of the devices.

    Raises:
      PlanError: no settings are found.
    """
    table = parameter_table(job)
    problem = _problem(job, devices, limit, table, hosts)
    if not problem:
        return job, ""
    for settings in candidates(job, devices):
        other = job.with_settings(settings)
        if not _problem(other, devices, limit, table, hosts):
            changed = differences(settings, job.config, devices)
            flags = " ".join(f"--config.{name}={value}" for name, value in changed.items())
            return other, f"planned not as configured ({problem}), but with {flags}"
    c = job.rollout
    raise PlanError(
        f"{problem}; no mesh of {devices} devices was found that {c.prompts} prompts x {c.completions} completions of "
        f"{c.max_new_tokens} tokens fit: fewer prompts, a smaller rollout.max_new_tokens, or more devices"
    )


def _problem(job: GrpoJob, devices: int, limit: int, table: Parameters, hosts: int) -> str:
    """Return why a job cannot run on the devices; '' if it is reckoned to fit."""
    problem = next(division_problems(job.config, devices, hosts), "")
    if problem:
        return problem
    shape = mesh_shape(dict(job.config.mesh), devices)
    wants = needed(rollout_memory(job, shape, remat_forms(job.config.model.remat, "")[-1], table))
    return "" if wants <= MARGIN * limit else f"about {wants / GIB:.0f} GiB would be wanted of {limit / GIB:.0f}"


def candidates(job: GrpoJob, devices: int) -> Iterator[dict[str, int]]:
    """Yield settings (dotted keys) for so many devices, best first; not all of them can be divided.

    Best is: little tensor parallelism in the learner, few keys that differ from the config, few tokens computed (a
    prompt once for many completions), few micro-batches.
    """
    found, share, c = [], _sampling_tensor(job, devices), job.rollout
    for tensor in divisors(job.model.text.num_kv_heads):
        for fsdp in divisors(devices // tensor) if devices % tensor == 0 else ():
            data = devices // tensor // fsdp
            other = 0 if fsdp == 1 and tensor == share else share
            for per_row in divisors(c.completions):
                rows = c.prompts * c.completions // per_row
                tokens = rows * (job.sizes.prefix + per_row * c.max_new_tokens)
                for parts in divisors(rows):
                    settings = {
                        "mesh.data": data,
                        "mesh.fsdp": fsdp,
                        "mesh.tensor": tensor,
                        "rollout.tensor": other,
                        "learner.completions_per_row": per_row,
                        "train.accumulation": parts,
                    }
                    changed = len(differences(settings, job.config, devices))
                    found.append(((tensor, changed, tokens, parts, -fsdp), settings))
    return (settings for _, settings in sorted(found, key=lambda x: x[0]))


def differences(settings: Mapping[str, int], config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """Return those settings that have to be set because the config comes to something else on so many devices."""
    try:
        shape = mesh_shape(dict(config.mesh), devices)
    except MeshError:
        shape = {}
    now = {f"mesh.{axis}": size for axis, size in shape.items()}
    now["rollout.tensor"] = config.rollout.tensor
    now["train.accumulation"] = config.train.accumulation
    now["learner.completions_per_row"] = completions_per_row(config)
    rest = {name: value for name, value in settings.items() if now.get(name) != value}
    if config.mesh.data == -1:  # takes what the other axes leave
        rest.pop("mesh.data", None)
    return rest


def _sampling_tensor(job: GrpoJob, devices: int) -> int:
    """Return how many devices share the weights while sampling: so many that none has filled-up rows only.

    Bounded by the key heads, over which the caches are split.
    """
    sizes = [t for t in divisors(job.model.text.num_kv_heads) if devices % t == 0]
    return next((t for t in sizes if devices // t <= job.at_once), sizes[-1])
