"""`--plan` of reinforcement learning: whether a run fits the devices it is meant for, and where its time will go."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from mllm4d_jax.parallel.rules import batch_shards
from mllm4d_jax.parallel.topology import GIB, Chip, open_topology, split_name
from mllm4d_jax.plan.compile import EFFICIENCY, USABLE, fits, itemsize, pass_traffic
from mllm4d_jax.plan.grpo_job import LONGEST, GrpoJob, Lengths, decode_rungs, plan_job
from mllm4d_jax.plan.grpo_programs import FIXED, Phase, Programs
from mllm4d_jax.plan.grpo_reckon import (
    cache_bytes,
    choose,
    decode_bytes,
    flops,
    gpu_record,
    gpu_table,
    rows_of_sampler,
)
from mllm4d_jax.plan.sft import MEMORY, parse_lengths
from mllm4d_jax.plan.step import PlanError

FORMULA = (
    f"The seconds of a program are the largest of: its FLOPs / devices / ({EFFICIENCY:.0%} of peak), bytes to and from "
    "memory / its rate, bytes received / the rate of one ring. A decode step reads the decoder's weights, the prompts' "
    "cache (once for all completions of a prompt) and the whole cache of the completions, used or not, which grows as "
    "they do; it is supposed that no completion ends before the longest one, so none is packed away. The longest is "
    f"taken to have {LONGEST} times the tokens of the mean one (never more than the cap). Copies that enlarge a cache, "
    "decoding videos, scoring texts, further rounds of dynamic sampling and held-out prompts are not counted, nor what "
    "a collective costs beside its bytes: take it as the better half of an estimate."
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step by phase, for completions of `mean` tokens.

    Attributes:
      seconds: as lower bounds by phase, and within one by what bounds it.
      flops: of a step with recomputation, over all devices.
      received: bytes that a device receives in a step.
    """

    mean: int
    longest: int
    seconds: dict[str, dict[str, float]]
    flops: float
    received: float

    @property
    def phases(self) -> dict[str, float]:
        """The largest bound of each phase."""
        return {name: max(bounds.values()) for name, bounds in self.seconds.items()}

    @property
    def step(self) -> float:
        return sum(self.phases.values())


@dataclasses.dataclass(frozen=True)
class GrpoPlan:
    """What is known of one topology.

    Attributes:
      topology, devices, mesh, sampler_mesh: what it is for.
      settings: prompts, completions, completions_per_row and accumulation that were planned.
      note: what has to be set differently; '' where the config can run.
      hbm: bytes of a device.
      phases: the compiled programs, in the order of a step.
      largest_prompts: most prompts of a step that are reckoned to fit, from the phases' bytes that grow with them.
      timings: for the expected completions and for the longest.
      hours: of the whole run with the expected completions.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    sampler_mesh: dict[str, int]
    settings: dict[str, int]
    note: str
    hbm: int
    phases: tuple[Phase, ...]
    largest_prompts: int
    timings: tuple[Timing, ...]
    hours: float

    @property
    def fits(self) -> bool:
        return all(fits(p.compiled, self.hbm) for p in self.phases)

    @property
    def peak(self) -> Phase:
        """The phase that wants most."""
        return max(self.phases, key=lambda p: p.compiled.needed)


def run(config: ml_collections.ConfigDict, workdir: str, targets: str) -> int:
    """Plans the run for each target, prints tables and writes plan.json and plan.md.

    Args:
      config: every key of the "grpo" task; data and weights need not exist.
      workdir: gets the two files.
      targets: separated by commas: TPU topologies such as "v5e:4x4", or "memory" for GPUs without compiling. "text="
        and "completion=" among them say how many tokens prompts and completions have, see `plan_job.Lengths`.

    Returns:
      0.

    Raises:
      PlanError, TopologyError, MeshError, ModelConfigError: what cannot be planned, and what to change.
    """
    words = [word.strip() for word in targets.split(",") if word.strip()]
    names, known = [word for word in words if "=" not in word], {f.name for f in dataclasses.fields(Lengths)}
    lengths = Lengths(**parse_lengths([word for word in words if "=" in word], known))
    if not names:
        raise PlanError("--plan needs a target: TPU topologies such as v5e:4x4,v5p:2x2x1, or memory")
    for name in names:
        if name != MEMORY:
            split_name(name)
    job = plan_job(config, lengths)
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    plans: list[GrpoPlan] = []
    parts, record = [heading(job)], dict(job=_job_facts(job))
    for name in names:
        if name == MEMORY:
            parts.append(gpu_table(job))
            record[MEMORY] = gpu_record(job)
            print(parts[-1], flush=True)
            continue
        print(f"compiling for {name} ...", flush=True)
        plans.append(plan_topology(job, name))
        print(details(plans[-1]), flush=True)
        _write(folder, parts, record, plans)  # the next one takes minutes
    _write(folder, parts, record, plans)
    if plans:
        print(f"{memory_table(plans)}\n\n{time_table(plans)}")
    print(f"see {folder / 'plan.md'}")
    return 0


def _write(folder: Path, parts: Sequence[str], record: dict[str, Any], plans: Sequence[GrpoPlan]) -> None:
    """plan.md and plan.json of what has been planned so far."""
    tables = [memory_table(plans), time_table(plans), *(details(p) for p in plans), FORMULA] if plans else []
    (folder / "plan.md").write_text("\n\n".join([*parts, *tables]) + "\n", encoding="utf-8")
    record = record | dict(plans=[_plain(p) for p in plans])
    (folder / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def plan_topology(job: GrpoJob, name: str) -> GrpoPlan:
    """Compiles the programs of a step for a topology.

    Raises:
      TopologyError: see `open_topology`.
      PlanError: nothing was found that the run would fit.
    """
    topology = open_topology(name)
    job, note = choose(job, len(topology.devices), topology.chip.hbm)
    programs = Programs(job, topology.devices)
    phases = []
    for phase in programs.phases():
        phases.append(phase)
        print(f"  {phase.name}: {phase.compiled.needed / GIB:.2f} GiB, {phase.compiled.seconds:.0f} s", flush=True)
    means = dict.fromkeys((job.lengths.completion, job.cap))
    timings = tuple(timing(job, programs, topology.chip, phases, mean) for mean in means)
    return GrpoPlan(
        topology=topology.name,
        devices=programs.mesh.size,
        mesh=dict(programs.mesh.shape),
        sampler_mesh=dict(programs.sampler_mesh.shape),
        settings=dict(
            prompts=job.prompts, completions=job.branches, completions_per_row=job.per_row, accumulation=job.parts
        ),
        note=note,
        hbm=topology.chip.hbm,
        phases=tuple(phases),
        largest_prompts=largest_prompts(job, phases, topology.chip.hbm, batch_shards(programs.mesh)),
        timings=timings,
        hours=timings[0].step * job.config.train.steps / 3600,
    )


def timing(job: GrpoJob, programs: Programs, chip: Chip, phases: Sequence[Phase], mean: int) -> Timing:
    """Seconds of a step with completions of `mean` tokens; see `FORMULA`."""
    received = {p.kind: sum(p.compiled.received.values()) for p in phases if p.mean in (0, mean)}
    seconds, total, moved = {}, 0.0, 0.0
    for name, calls in _calls(job, programs, mean).items():
        bounds = {"compute": 0.0, "memory": 0.0, "network": 0.0}
        for kind, times, operations, traffic, loops in calls:
            network = times * loops * received.get(kind, 0)
            bounds["compute"] += times * operations / programs.mesh.size / (EFFICIENCY * chip.flops)
            bounds["memory"] += times * traffic / chip.hbm_rate
            bounds["network"] += network / chip.ici_rate
            total, moved = total + times * operations, moved + network
        seconds[name] = bounds
    return Timing(mean, job.longest(mean), seconds, total, moved)


def _calls(job: GrpoJob, programs: Programs, mean: int) -> dict[str, list[tuple[str, int, float, float, int]]]:
    """For each phase of a step its programs: (kind, how often, FLOPs, bytes on a device, runs of its loop).

    The collectives of a decode program are those of one step, since the text does not show how often its loop runs.
    """
    data, split = batch_shards(programs.sampler_mesh), programs.sampler_mesh.shape["tensor"]
    cost, rows = flops(job, programs.tuning, mean, data), rows_of_sampler(job, data)
    item, text, iterations = itemsize(job.config), job.model.text, job.config.objective.iterations
    prefilled = pass_traffic(text, item, programs.sampler_mesh, rows / data * job.prompt.length)
    own = job.rows / job.parts / batch_shards(programs.mesh) * job.row_sizes(mean).layout.size
    learned = pass_traffic(text, item, programs.mesh, own)
    passes = 2 + (job.config.model.remat == "full")
    rungs = decode_rungs(programs.ladder, job.config.rollout.chunk, job.longest(mean), job.cap)
    split = data * (split if text.num_kv_heads % split == 0 else 1)
    caches = cache_bytes(job, rows, job.prompt.length) / split, cache_bytes(job, rows, 1, job.branches) / split
    decoded = decode_bytes(programs.read, *caches, rungs)
    operations = sum(n * cost.decode(slots) for slots, n in rungs)
    times, held = job.prompts // job.at_once, programs.held(sampling=False)
    changed = 2.0 * (held["adapter"] + held["optimiser"])
    return {
        "vision": [("encode", 1, cost.encode, float(programs.vision), 1)],
        "prefill": [("prefill", times, cost.prefill, prefilled, 1)],
        "decode": [("decode", times, operations, decoded, sum(n for _, n in rungs))],
        "score": [("score", job.parts * job.scored, cost.score, learned, 1)],
        "update": [
            ("gradient", job.parts * iterations, cost.add, passes * learned, 1),
            ("optimiser", iterations, 0.0, changed, 1),
        ],
    }


def largest_prompts(job: GrpoJob, phases: Sequence[Phase], hbm: int, shards: int) -> int:
    """Most prompts of a step for which every phase is reckoned to fit.

    Bytes of weights, of what is trained and of the program stay, all else grows with the prompts; phases of a sampler
    that takes a few of them at a time (rollout.prompts_at_once) do not grow. The rows have to divide among
    micro-batches and devices.
    """
    most = math.inf
    for p in phases:
        if not p.prompts or (p.sampling and job.config.rollout.prompts_at_once):
            continue
        fixed = sum(n for kind, n in (p.compiled.memory or p.held).items() if kind in FIXED)
        most = min(most, p.prompts * (USABLE * hbm - fixed) / max(p.compiled.needed - fixed, 1))
    each = job.parts * shards
    step = math.lcm(each // math.gcd(job.branches // job.per_row, each), job.config.rollout.prompts_at_once or 1)
    return max(0, math.floor(most / step) * step) if math.isfinite(most) else 0


def heading(job: GrpoJob) -> str:
    """What is planned, in words."""
    c, p = job.config, job.prompt
    return (
        f"# Plan\n\n{c.model.published or c.model.path}, {c.model.dtype}, trained: {', '.join(c.train.trainable)}"
        f" (rank {c.lora.rank}), remat {c.model.remat}, objective {c.objective.preset}. {job.prompts} prompts of "
        f"{p.length} tokens with {p.frames} x {p.frame_patches} patches, {job.branches} completions each of at most "
        f"{job.cap} tokens. Prompts are taken to have {job.lengths.text} tokens besides the clip, completions "
        f"{job.lengths.completion} on average (other lengths: text= and completion= among the targets), clips as many "
        f"frames and pixels as the config allows. Memory is for completions that all reach the cap."
    )


def memory_table(plans: Sequence[GrpoPlan]) -> str:
    """Markdown, a line for each topology."""
    lines = [
        "| topology | learner's mesh | sampler's mesh | prompts x completions | completions per row, micro-batches | "
        "peak GiB of HBM (in) | caches GiB | fits | most prompts | compile s |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for p in plans:
        s, peak = p.settings, p.peak
        caches = max(sum(n for kind, n in (x.compiled.memory or {}).items() if "cache" in kind) for x in p.phases)
        lines.append(
            f"| {p.topology} | {_axes(p.mesh)} | {_axes(p.sampler_mesh)} | {s['prompts']} x {s['completions']} | "
            f"{s['completions_per_row']}, {s['accumulation']} | {peak.compiled.needed / GIB:.2f} of {p.hbm / GIB:.0f} "
            f"({peak.name}) | {caches / GIB:.2f} | {'yes' if p.fits else 'no'} | about {p.largest_prompts} | "
            f"{sum(x.compiled.seconds for x in p.phases):.0f} |"
        )
    return "\n".join(lines)


def time_table(plans: Sequence[GrpoPlan]) -> str:
    """Markdown, a line for each topology and length of completions."""
    names = list(plans[0].timings[0].seconds)
    lines = [
        "| topology | tokens of a completion (longest) | PFLOP per step | GB received per device | "
        + " | ".join(f"{name} s" for name in names)
        + " | s per step | hours |",
        "|---|---:|---:|---:|" + "---:|" * (len(names) + 2),
    ]
    for p in plans:
        for t in p.timings:
            cells = [f"{max(b.values()):.2f} ({max(b, key=b.__getitem__)})" for b in t.seconds.values()]
            hours = p.hours * t.step / p.timings[0].step
            lines.append(
                f"| {p.topology} | {t.mean} ({t.longest}) | {t.flops / 1e15:.2f} | {t.received / 1e9:.1f} | "
                + " | ".join(cells)
                + f" | {t.step:.1f} | {hours:,.0f} |"
            )
    return "\n".join(lines)


def details(p: GrpoPlan) -> str:
    """Memory of each phase by kind, collectives, kernels and findings of one topology."""
    kinds = list(dict.fromkeys(k for x in p.phases for k, n in (x.compiled.memory or {}).items() if n >= GIB / 200))
    lines = [
        f"{p.topology}, {p.devices} devices, GiB on each by what it is for ({USABLE:.0%} of {p.hbm / GIB:.0f} are "
        "counted as usable):",
        "",
        "| program | " + " | ".join(kinds) + " | GB received | kernels | compile s |",
        "|---|" + "---:|" * (len(kinds) + 3),
    ]
    for x in p.phases:
        c = x.compiled
        cells = (
            [f"{c.memory[k] / GIB:.2f}" if c.memory.get(k) else "" for k in kinds] if c.memory else [""] * len(kinds)
        )
        if c.memory is None:
            cells[-1] = f"refused: {c.needed / GIB:.1f}"
        lines.append(
            f"| {x.name} | " + " | ".join(cells) + f" | {sum(c.received.values()) / 1e9:.2f} | {c.kernels} | "
            f"{c.seconds:.0f} |"
        )
    whole = sorted({name for x in p.phases for name in x.compiled.whole})
    lines += ["", f"All logits or all scores of a row: {', '.join(whole) or 'nowhere'}."]
    if any(x.kind == "gradient" and not x.compiled.kernels and x.compiled.memory for x in p.phases):
        lines.append("The update has no attention kernel: see model.attention.")
    if p.note:
        lines.append(f"Planned {p.note}.")
    return "\n".join(lines)


def _axes(mesh: dict[str, int]) -> str:
    return " ".join(f"{name} {n}" for name, n in mesh.items() if n > 1) or "one device"


def _job_facts(job: GrpoJob) -> dict[str, Any]:
    return dict(
        model=job.config.model.published or job.config.model.path,
        prompt=dataclasses.asdict(job.prompt),
        lengths=dataclasses.asdict(job.lengths),
        cap=job.cap,
        steps=job.config.train.steps,
    )


def _plain(p: GrpoPlan) -> dict[str, Any]:
    steps = {t.mean: t.step for t in p.timings}
    return dataclasses.asdict(p) | dict(fits=p.fits, peak=p.peak.name, step_seconds=steps)
