"""`--plan`: whether a run fits the devices it is meant for, and how long it will take, before there are any."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from mllm4d_jax.parallel.topology import GIB, split_name
from mllm4d_jax.plan import memory as plan_memory
from mllm4d_jax.plan.compile import EFFICIENCY, FORMULA, USABLE, DevicePlan, plan_topology
from mllm4d_jax.plan.step import PlanError, PlanJob, Texts, plan_job

MEMORY = "memory"


def run(config: ml_collections.ConfigDict, workdir: str, targets: str) -> int:
    """Plans the run for each target, prints a table and writes plan.json and plan.md.

    Args:
      config: every key of the "sft" task; data and weights need not exist.
      workdir: gets the two files.
      targets: separated by commas: TPU topologies such as "v5e:4x4", with "+" after it to compile other batches too
        and see how many rows fit, or "memory" for GPUs without compiling. "branch=", "answer=" and "system=" among
        them say how many tokens the records' texts have, see `plan_step.Texts`.

    Returns:
      0.

    Raises:
      PlanError, TopologyError, MeshError, ModelConfigError, LoaderError: what cannot be planned, and what to change.
    """
    words = [word.strip() for word in targets.split(",") if word.strip()]
    names, texts = [word for word in words if "=" not in word], parse_texts([word for word in words if "=" in word])
    if not names:
        raise PlanError("--plan needs a target: TPU topologies such as v5e:4x4,v5p:2x2x1, or memory")
    for name in names:
        if name != MEMORY:
            split_name(name.removesuffix("+"))
    job = plan_job(config, texts)
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    plans: list[DevicePlan] = []
    parts = [heading(job)]
    for name in names:
        if name == MEMORY:
            parts.append(plan_memory.table(job))
            print(parts[-1], flush=True)
            continue
        print(f"compiling for {name} ...", flush=True)
        plans.append(plan_topology(job, name.removesuffix("+"), name.endswith("+")))
        print(details(plans[-1]), flush=True)
    if plans:
        parts += [table(plans), *(details(p) for p in plans), FORMULA]
        print(table(plans))
    (folder / "plan.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    record = dict(job=_job_facts(job), plans=[_plain(p) for p in plans])
    if MEMORY in names:
        record[MEMORY] = plan_memory.record(job)
    (folder / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"see {folder / 'plan.md'}")
    return 0


def parse_texts(words: Sequence[str]) -> Texts:
    """Lengths such as ["branch=120", "answer=8"]; the others are as they are. Raises PlanError for anything else."""
    texts = Texts(**parse_lengths(words, {field.name for field in dataclasses.fields(Texts)}))
    if texts.answer > texts.branch:
        raise PlanError(f"--plan: branches of {texts.branch} tokens cannot hold answers of {texts.answer}")
    return texts


def parse_lengths(words: Sequence[str], known: Collection[str]) -> dict[str, int]:
    """Numbers of tokens by name, from words such as "branch=120". Raises PlanError for anything else."""
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known or not value.isdecimal() or not int(value):
            raise PlanError(f"--plan: '{word}' is not one of {', '.join(f'{n}=TOKENS' for n in sorted(known))}")
        found[name] = int(value)
    return found


def heading(job: PlanJob) -> str:
    """What is planned, in words."""
    s, c = job.sizes, job.config
    return (
        f"# Plan\n\n{c.model.published or c.model.path}, {c.model.dtype}, trained: {', '.join(c.train.trainable)}"
        f" (rank {c.lora.rank}), remat {c.model.remat}. A row: {s.prefix} prefix tokens and {s.slots} branches of "
        f"{s.length}; {s.frames} x {s.frame_patches} patches; {s.supervised} places for supervised tokens. Branches "
        f"are taken to have {job.texts.branch} tokens, {job.texts.answer} of them supervised, and {job.texts.system} "
        f"tokens to come before a video (other lengths: branch=, answer= and system= among the targets), clips as many "
        f"frames and pixels as the config allows."
    )


def table(plans: Sequence[DevicePlan]) -> str:
    """Markdown, a line for each topology."""
    lines = [
        "| topology | mesh | rows per device | questions per step | peak GiB of HBM | fits | largest rows per device | "
        "TFLOP per step (with recomputation) | GB received per device | s per step (bound) | hours | compile s |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for p in plans:
        bound = max(p.seconds, key=p.seconds.__getitem__)
        axes = " ".join(f"{name} {n}" for name, n in p.mesh.items() if n > 1)
        total = p.flops.total
        largest = {"seen": "{}", "at least": "{} or more", "estimated": "about {}"}[p.certainty].format(p.largest_rows)
        lines.append(
            f"| {p.topology} | {axes} | {p.compiled.rows} | {p.questions:,} | {p.compiled.needed / GIB:.2f} of "
            f"{p.hbm / GIB:.0f} | {'yes' if p.fits else 'no'} | {largest} | {total.model / 1e12:,.0f} "
            f"({total.hardware / 1e12:,.0f}) | {sum(p.compiled.received.values()) / 1e9:.1f} | "
            f"{p.step_seconds:.2f} ({bound}) | {p.hours:,.1f} | {p.compiled.seconds:.0f} |"
        )
    return "\n".join(lines)


def details(p: DevicePlan) -> str:
    """Memory by kind, FLOPs by part, collectives and findings of one topology."""
    c = p.compiled
    if c.memory is None:
        return f"{p.topology}: {c.rows} rows a device do not fit; the compiler asked for {c.needed / GIB:.1f} GiB"
    kinds = ", ".join(f"{kind} {n / GIB:.3f}" for kind, n in c.memory.items())
    parts = ", ".join(f"{f.name} {getattr(p.flops, f.name).hardware / 1e12:,.1f}" for f in dataclasses.fields(p.flops))
    sent = ", ".join(f"{kind} {n / 1e9:.2f}" for kind, n in sorted(c.received.items())) or "none"
    lines = [
        f"{p.topology}, {p.devices} devices",
        f"- GiB per device: {kinds}; {USABLE:.0%} of {p.hbm / GIB:.0f} are counted as usable",
        f"- TFLOP per step: {parts}",
        f"- GB received per device and micro-batch: {sent}; largest gathered array {c.gathered or 'none'}",
        f"- seconds: {', '.join(f'{k} {v:.3f}' for k, v in p.seconds.items())} (compute at {EFFICIENCY:.0%} of peak)",
        f"- {c.kernels} Pallas kernel calls; largest arrays {', '.join(c.largest)}",
        f"- all logits or all scores of a row: {', '.join(c.whole) or 'nowhere'}",
    ]
    return "\n".join([*lines, *(f"- {note}" for note in p.notes)])


def _job_facts(job: PlanJob) -> dict[str, Any]:
    return dict(
        model=job.config.model.published or job.config.model.path,
        rows=job.rows,
        questions_per_row=job.questions,
        sizes=dataclasses.asdict(job.sizes),
        texts=dataclasses.asdict(job.texts),
        steps=job.config.train.steps,
        accumulation=job.config.train.accumulation,
    )


def _plain(p: DevicePlan) -> dict[str, Any]:
    total = p.flops.total
    return dataclasses.asdict(p) | dict(
        fits=p.fits, step_seconds=p.step_seconds, model_flops=total.model, hardware_flops=total.hardware
    )
