"""One topology's plan: the step compiled for it, and what the compiled program says."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from mllm4d_jax.models.config import TextConfig
from mllm4d_jax.models.flops import Cost, StepFlops, padded_work, step_flops
from mllm4d_jax.parallel import collectives as hlo
from mllm4d_jax.parallel.chips import Chip
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.rules import batch_shards
from mllm4d_jax.parallel.topology import open_topology
from mllm4d_jax.plan.step import AbstractStep, PlanJob, abstract_step

USABLE = 0.95  # of the memory; the rest is the runtime's, and what fragmentation leaves
EFFICIENCY = 0.5  # share of peak FLOP/s that the matrix products of a step are taken to reach
SEARCH = 2  # further compilations to find the largest batch
_KERNEL = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one compilation told.

    Attributes:
      rows: rows on each device.
      memory: bytes on a device by kind; "peak" is their sum less what results share with arguments. None when the
        compiler itself refused for lack of memory.
      needed: bytes the program wants, also when it was refused.
      seconds: of lowering and compiling.
      kernels: calls of Pallas kernels in the program.
      received: bytes a device receives in a step, by collective.
      gathered: the largest array that a gather makes, as text with its bytes.
      largest: the largest arrays made, as text.
      whole: arrays that must not exist: all logits of a row, or all scores.
    """

    rows: int
    memory: dict[str, int] | None
    needed: int
    seconds: float
    kernels: int = 0
    received: dict[str, int] = dataclasses.field(default_factory=dict)
    gathered: str = ""
    largest: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """A row of the table.

    Attributes:
      topology, devices, mesh: what it is for.
      notes: what differs from the config.
      compiled: at the planned batch.
      largest_rows: most rows that a device holds; `certainty` is "seen" when one more was seen not to fit, "at least"
        when it was not tried, "estimated" without any search.
      flops: of a step, over all devices.
      seconds: of a step, by what could bound it: "compute", "memory", "network".
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    notes: tuple[str, ...]
    questions: int
    hbm: int
    compiled: Compiled
    largest_rows: int
    certainty: str
    flops: StepFlops
    seconds: dict[str, float]
    hours: float

    @property
    def fits(self) -> bool:
        return fits(self.compiled, self.hbm)

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())


def fits(compiled: Compiled, hbm: int) -> bool:
    """Whether a program that wants that much can run."""
    return compiled.memory is not None and compiled.needed <= USABLE * hbm


def plan_topology(job: PlanJob, name: str, searching: bool = False) -> DevicePlan:
    """Compiles the step for a topology.

    Args:
      name: e.g. "v5e:4x4".
      searching: compile larger or smaller batches too, to see how many rows a device can hold.

    Raises:
      TopologyError: see `open_topology`.
      MeshError: the configured mesh does not fit the topology.
    """
    topology = open_topology(name)
    mesh, chip = make_mesh(dict(job.config.mesh), topology.devices), topology.chip
    shards, notes = batch_shards(mesh), []
    rows = -(-job.rows // shards)
    if job.rows % shards:
        notes.append(f"{job.rows} rows cannot be split over {shards} devices: planned with {rows * shards}")
    step = abstract_step(job, mesh, rows * shards)
    first = compile_rows(job, mesh, rows)
    largest, certainty = search(job, mesh, first, chip.hbm) if searching else (_guess([first], chip.hbm), "estimated")
    flops = _flops(job, step, rows * shards)
    seconds = step_seconds(job, mesh, chip, first, flops)
    return DevicePlan(
        topology=topology.name,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        notes=tuple(notes),
        questions=rows * shards * job.questions * job.config.train.accumulation,
        hbm=chip.hbm,
        compiled=first,
        largest_rows=max(0, largest),
        certainty=certainty,
        flops=flops,
        seconds=seconds,
        hours=max(seconds.values()) * job.config.train.steps / 3600,
    )


def search(job: PlanJob, mesh: Mesh, first: Compiled, hbm: int) -> tuple[int, str]:
    """(most rows of a device that were seen to fit, how certain that is); compiles at most `SEARCH` times.

    Memory is nearly a straight line over the rows, so each guess is where the line through what is known meets the
    limit. Before there is a second point, all but the weights and their like is taken to grow with the rows.
    """
    tried = [first]
    good, bad = 0, None
    for _ in range(SEARCH + 1):
        good = max((c.rows for c in tried if fits(c, hbm)), default=0)
        bad = min((c.rows for c in tried if not fits(c, hbm)), default=None)
        if bad == good + 1 or len(tried) > SEARCH:
            break
        guess = max(_guess(tried, hbm), good + 1)
        if any(c.rows == guess for c in tried):
            guess += 1
        tried.append(compile_rows(job, mesh, guess if bad is None else min(guess, bad - 1)))
    return good, "seen" if bad == good + 1 else "at least"


def _guess(tried: list[Compiled], hbm: int) -> int:
    points = sorted((c.rows, c.needed) for c in tried if c.needed)
    if len(points) > 1:
        (r0, n0), (r1, n1) = points[0], points[-1]
        slope = (n1 - n0) / (r1 - r0)
    else:
        r1, n1 = points[0]
        memory = tried[0].memory
        fixed = sum(memory[k] for k in ("frozen", "trainable", "optimiser")) if memory else 0
        slope = (n1 - fixed) / r1
    return math.floor(r1 + (USABLE * hbm - n1) / max(slope, 1.0))


def compile_rows(job: PlanJob, mesh: Mesh, rows: int) -> Compiled:
    """Compiles the step with `rows` rows on each device."""
    step = abstract_step(job, mesh, rows * batch_shards(mesh))
    return compile_program(step.lower, step.bytes(), lambda dtype, dims: _forbidden(job, dtype, dims), rows)[0]


def compile_program(
    lower: Callable[[], jax.stages.Lowered],
    placed: dict[str, int],
    forbidden: Callable[[str, tuple[int, ...]], bool],
    rows: int,
) -> tuple[Compiled, jax.stages.Compiled | None]:
    """Compiles a program and reads what it says; (what it says, the program or None if there is no memory for it).

    Args:
      lower: traces it.
      placed: bytes on a device of its arguments, by kind.
      forbidden: whether an array of that dtype and those dimensions must not exist.
      rows: on each device.
    """
    started = time.perf_counter()
    try:
        program = lower().compile()
    except jax.errors.JaxRuntimeError as problem:
        wanted = _wanted(str(problem))
        if wanted is None:
            raise
        return Compiled(rows, None, wanted, time.perf_counter() - started), None
    seconds = time.perf_counter() - started
    memory = memory_by_kind(placed, program.memory_analysis())
    text = program.as_text()
    found = hlo.collectives(text)
    gathers = [c for c in found if c.kind == "all-gather"]
    most = max(gathers, key=lambda c: c.received, default=None)
    arrays = {(n, dtype, dims) for _, dtype, dims, n in hlo.arrays(text)}
    made = sorted({(n, f"{dtype}{list(dims)}") for n, dtype, dims in arrays}, reverse=True)
    compiled = Compiled(
        rows=rows,
        memory=memory,
        needed=memory["peak"],
        seconds=seconds,
        kernels=text.count(_KERNEL),
        received=hlo.received_bytes(found),
        gathered="" if most is None else " ".join(f"{d}{list(s)}" for d, s in most.shapes),
        largest=tuple(name for _, name in made[:5]),
        whole=tuple(sorted(f"{dtype}{list(dims)}" for _, dtype, dims in arrays if forbidden(dtype, dims))),
    )
    return compiled, program


def _forbidden(job: PlanJob, dtype: str, dims: tuple[int, ...]) -> bool:
    return whole_row(job.sizes.layout.size, job.model.text.vocab_size, dtype, dims)


def whole_row(size: int, vocabulary: int, dtype: str, dims: tuple[int, ...]) -> bool:
    """Whether an array holds the logits of every position of a row of `size`, or a score for every pair of them."""
    logits = dtype == "f32" and vocabulary in dims and math.prod(dims) >= size * vocabulary
    return logits or dims.count(size) >= 2


def memory_by_kind(placed: dict[str, int], stats: Any) -> dict[str, int]:
    """Bytes on a device: what the arguments are, what the compiler adds, and the sum that has to fit.

    Args:
      placed: bytes of each tree of arguments.
      stats: of the compiled program (`memory_analysis`).
    """
    kinds = dict(placed)
    # Arguments are padded to tiles. A program is not handed those that it never reads, but they are in memory, too.
    kinds["layout"] = max(0, stats.argument_size_in_bytes - sum(placed.values()))
    kinds["temporaries"] = stats.temp_size_in_bytes
    kinds["results"] = stats.output_size_in_bytes - stats.alias_size_in_bytes  # beyond the donated
    kinds["program"] = stats.generated_code_size_in_bytes
    return kinds | {"peak": sum(kinds.values())}


def _wanted(message: str) -> int | None:
    """Bytes named by the compiler's out-of-memory error, None for another error."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message and not found:
        return None
    return int(float(found[1]) * 2 ** (10 * (" KMGT".index(found[2])))) if found else 0


def _flops(job: PlanJob, step: AbstractStep, rows: int) -> StepFlops:
    s = job.sizes
    work = padded_work(s.layout, rows, rows * s.frames, s.frame_patches, rows * s.supervised)
    one = step_flops(job.model, work, step.tuning)
    k = job.config.train.accumulation
    return StepFlops(*(getattr(one, f.name) * k for f in dataclasses.fields(one)))


def step_seconds(job: PlanJob, mesh: Mesh, chip: Chip, compiled: Compiled, flops: StepFlops) -> dict[str, float]:
    """Lower bounds of a step's time, of which the largest is taken; see `FORMULA`."""
    total: Cost = flops.total
    k = job.config.train.accumulation
    return {
        "compute": total.hardware / mesh.size / (EFFICIENCY * chip.flops),
        "memory": k * traffic(job, mesh, compiled.rows) / chip.hbm_rate,
        "network": k * sum(compiled.received.values()) / chip.ici_rate,
    }


FORMULA = (
    f"step time = max(FLOPs with recomputation / devices / ({EFFICIENCY:.0%} of peak), bytes to and from memory / its "
    "rate, bytes received / rate of one ring). Bytes to and from memory: the decoder's weights once forward, once "
    "again and once backward, with the inputs and results of its matrix products; bytes received: collectives of the "
    "compiled program, each as often as its loop runs. What overlaps and what waits is not modelled: take it as the "
    "better half of an estimate."
)


def traffic(job: PlanJob, mesh: Mesh, rows: int) -> float:
    """Bytes a device reads and writes in a micro-batch, caches aside."""
    passes = 2 + (job.config.model.remat == "full")
    return passes * pass_traffic(job.model.text, itemsize(job.config), mesh, rows * job.sizes.layout.size)


def itemsize(config: ml_collections.ConfigDict) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.model.dtype == "bfloat16" else 4


def pass_traffic(t: TextConfig, item: int, mesh: Mesh, tokens: float) -> float:
    """Bytes a device reads and writes in one pass of `tokens` tokens (its own) through the decoder."""
    tensor = mesh.shape.get("tensor", 1)
    q, k = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    shapes = [(t.hidden_size, q), (t.hidden_size, k), (t.hidden_size, k), (q, t.hidden_size)]
    inner = t.moe.intermediate_size if t.moe else t.intermediate_size
    experts, used = (t.moe.num_experts, t.moe.top_k) if t.moe else (1, 1)
    feed = [(t.hidden_size, inner), (t.hidden_size, inner), (inner, t.hidden_size)]
    weights = sum(a * b for a, b in shapes) + experts * sum(a * b for a, b in feed)
    activations = sum(a + b for a, b in shapes) + used * sum(a + b for a, b in feed)
    return float(t.num_layers * (weights + tokens * activations) / tensor * item)
