"""`--plan`: whether a run fits the devices it is meant for, and how long it will take, before there are any."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from mllm4d_jax import __version__
from mllm4d_jax.files.atomic import write_atomic, write_json
from mllm4d_jax.files.remote import place
from mllm4d_jax.parallel.chips import GIB
from mllm4d_jax.parallel.topology import Topology, open_topology, split_name
from mllm4d_jax.plan.compile import FORMULA, compile_phase, compile_phases, timing
from mllm4d_jax.plan.grpo import GrpoPhases
from mllm4d_jax.plan.job import GrpoJob, Lengths, PlanError, PlanJob
from mllm4d_jax.plan.memory import choose, gpu_record, policies
from mllm4d_jax.plan.sft import SftPhases
from mllm4d_jax.plan.tables import DECODING, TopologyPlan, details, gpu_table, heading, tables

MEMORY = "memory"


def run(config: ml_collections.ConfigDict, workdir: str, targets: str) -> int:
    """Plan the run for each target, print tables and write plan.json and plan.md.

    Args:
      config: every key of the "sft" or "grpo" task; data and weights need not exist.
      workdir: gets the two files, anew after each target, since the next one may take minutes.
      targets: separated by commas: TPU topologies such as "v5e:4x4" or GPUs such as "h100" and "h200:8", in fine-tuning
        with "+" after it to compile other batches too and see how many rows fit, or "memory" for GPUs without
        compiling. Words such as "branch=120" among them say how many tokens the records' texts have, see `job.Lengths`.

    Returns:
      0.

    Raises:
      PlanError, BuildError, TopologyError, MeshError, ModelConfigError, ProcessorError, LoaderError: what cannot be
        planned, and what to change.
    """
    words = [word.strip() for word in targets.split(",") if word.strip()]
    names = [word for word in words if "=" not in word]
    lengths = Lengths.parse([word for word in words if "=" in word], config)
    if not names:
        raise PlanError(
            "--plan needs a target: TPU topologies such as v5e:4x4,v5p:2x2x1, GPUs such as h100,h200:8, or memory"
        )
    for name in names:
        if name != MEMORY:
            split_name(name.removesuffix("+") if config.task == "sft" else name)
    job = (PlanJob if config.task == "sft" else GrpoJob).of(config, lengths)
    folder = place(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    plans: list[TopologyPlan] = []
    gpus: list[dict[str, Any]] = []
    for name in names:
        if name == MEMORY:
            gpus = gpu_record(job)
            print(gpu_table(job, gpus), flush=True)
        else:
            print(f"compiling for {name} ...", flush=True)
            plans.append(plan_topology(job, name))
            print(details(plans[-1]), flush=True)
        _write(folder, job, plans, gpus)
    if plans:
        print("\n\n".join(tables(job, plans)))
    print(f"see {folder / 'plan.md'}")
    return 0


def plan_topology(job: PlanJob, name: str) -> TopologyPlan:
    """Compile the phases of a step for a topology such as "v5e:4x4", in fine-tuning also "v5e:4x4+"; raise as `run`."""
    topology = open_topology(name.removesuffix("+"))
    devices, limit = topology.devices, topology.chip.usable
    for remat in policies(job, devices[0].platform, len(devices), limit):
        plan = _plan(job.with_settings({"model.remat": remat}), topology, name.endswith("+"))
        if plan.fits:
            break
    if job.config.model.remat == remat:
        return plan
    return dataclasses.replace(plan, notes=(*plan.notes, f"model.remat={job.config.model.remat} is '{remat}' here"))


def _plan(job: PlanJob, topology: Topology, searching: bool) -> TopologyPlan:
    """Compile the phases of a step under one policy of `model.remat`."""
    devices, limit, compiled = topology.devices, topology.chip.usable, []
    how = job.model.text.vocab_size, topology.options
    if isinstance(job, GrpoJob):
        job, note = choose(job, len(devices), limit, len({device.process_index for device in devices}))
        step = GrpoPhases(job, devices, note, topology.host)
    else:
        step = SftPhases(job, devices)
    for one in compile_phases(step.phases(), *how):
        compiled.append(one)
        print(f"  {one.phase.name}: {one.needed / GIB:.2f} GiB, {one.seconds:.0f} s", flush=True)
    other = (lambda phase: compile_phase(phase, *how)[0]) if searching else None
    largest, certainty = step.largest(compiled, limit, other)
    timings = tuple(
        timing(step.calls(mean), compiled, len(devices), topology.chip, mean, longest)
        for mean, longest in step.lengths.items()
    )
    return TopologyPlan(
        topology=topology.name,
        devices=len(devices),
        mesh=dict(step.mesh.shape),
        hbm=topology.chip.hbm,
        usable=limit,
        notes=step.notes,
        phases=tuple(compiled),
        timings=timings,
        hours=timings[0].step * job.config.train.steps / 3600,
        largest=largest,
        certainty=certainty,
        facts=step.facts(),
    )


def _write(folder: Path, job: PlanJob, plans: Sequence[TopologyPlan], gpus: Sequence[dict[str, Any]]) -> None:
    """Write what has been planned so far."""
    parts = [heading(job), *([gpu_table(job, gpus)] if gpus else [])]
    if plans:
        parts += [*tables(job, plans), *map(details, plans), FORMULA + DECODING * isinstance(job, GrpoJob)]
    write_atomic(folder / "plan.md", ("\n\n".join(parts) + "\n").encode())
    c, sizes, lengths = job.config, dataclasses.asdict(job.sizes), dataclasses.asdict(job.lengths)
    facts = dict(
        task=c.task, model=c.model.path or c.model.published, sizes=sizes, lengths=lengths, steps=c.train.steps
    )
    record = dict(version=__version__, job=facts, plans=[p.record for p in plans]) | ({MEMORY: gpus} if gpus else {})
    write_json(folder / "plan.json", record)
