"""A plan of a topology, and plans as text: Markdown tables, one line for each topology, and the details of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mllm4d_jax.parallel.chips import GIB
from mllm4d_jax.plan.compile import EFFICIENCY, Compiled, Timing
from mllm4d_jax.plan.job import LONGEST, GrpoJob, Lengths, PlanJob
from mllm4d_jax.plan.memory import COPY, GPUS

DECODING = (
    " A decode step reads the decoder's weights, the prompts' cache (once for all completions of a prompt) and the "
    "whole cache of the completions, used or not, which grows as they do; none is packed away, as if all ended with "
    f"the longest, which is taken to have {LONGEST} times the tokens of the mean one (never more than the cap). Copies "
    "that enlarge a cache, decoding videos, scoring texts, further rounds of dynamic sampling and held-out prompts are "
    "not counted."
)


@dataclasses.dataclass(frozen=True)
class TopologyPlan:
    """What is known of a run on one topology.

    Attributes:
      topology, devices, mesh: what it is for.
      hbm, usable: bytes of a device, and those that programs can have.
      notes: what differs from the config.
      phases: the compiled programs, in the order of a step.
      timings: of a step; for the expected completions first.
      hours: of the whole run with these.
      largest: most rows of a device, or prompts of a step, that fit; certainty: "seen" when one more was seen not to
        fit, "at least" when that was not tried, "estimated" without any search.
      facts: what else was planned with, by name.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    hbm: int
    usable: int
    notes: tuple[str, ...]
    phases: tuple[Compiled, ...]
    timings: tuple[Timing, ...]
    hours: float
    largest: int
    certainty: str
    facts: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether every phase can run."""
        return all(c.fits(self.usable) for c in self.phases)

    @property
    def peak(self) -> Compiled:
        """The phase that wants most memory."""
        return max(self.phases, key=lambda c: c.needed)

    @property
    def record(self) -> dict[str, Any]:
        """The plan as plan.json has it."""
        found = dataclasses.asdict(dataclasses.replace(self, phases=()))
        found["phases"] = [vars(c.phase) | vars(c) for c in self.phases]
        for compiled in found["phases"]:
            del compiled["phase"], compiled["lower"]
        steps = {t.mean: t.step for t in self.timings}
        return found | dict(fits=self.fits, peak=self.peak.phase.name, step_seconds=steps)


def heading(job: PlanJob) -> str:
    """Return what is planned, in words."""
    c, s = job.config, job.sizes
    rows = (
        f"a row: {s.prefix} prefix tokens, {s.slots} branches of {s.length}, {s.supervised} places for supervised ones"
    )
    if isinstance(job, GrpoJob):
        r = job.rollout
        rows = f"objective {c.objective.preset}: {r.prompts} prompts of {s.prefix} tokens, {r.completions} completions "
        rows += f"each of at most {r.max_new_tokens} (memory is for completions that all reach that)"
    texts = ", ".join(f"{name}={getattr(job.lengths, name)}" for name in Lengths.names(c.task))
    model = f"{c.model.path or c.model.published}, {c.model.dtype}, trained: {', '.join(c.train.trainable)}"
    return (
        f"# Plan\n\n{model} (rank {c.lora.rank}), remat {c.model.remat}; {rows}; {s.frames} x {s.frame_patches} "
        "patches. Clips have as many frames and pixels as the config allows; texts are taken to have, in tokens, "
        f"{texts} (other lengths: among the targets)."
    )


def tables(job: PlanJob, plans: Sequence[TopologyPlan]) -> list[str]:
    """Return the tables of a task's plans."""
    return [memory_table(plans), time_table(plans)] if isinstance(job, GrpoJob) else [step_table(plans)]


def step_table(plans: Sequence[TopologyPlan]) -> str:
    """Return the table of plans of fine-tuning."""
    rows = []
    for p in plans:
        (c,), (t,), f = p.phases, p.timings, p.facts
        most = {"seen": "{}", "at least": "{} or more", "estimated": "about {}"}[p.certainty].format(p.largest)
        rows.append(
            f"{p.topology} | {_axes(p.mesh)} | {c.phase.rows} | {f['questions']:,} | {c.needed / GIB:.2f} of "
            f"{p.hbm / GIB:.0f} | {'yes' if p.fits else 'no'} | {most} | {f['model_flops'] / 1e12:,.0f} "
            f"({t.flops / 1e12:,.0f}) | {sum(c.received.values()) / 1e9:.1f} | {_bound(t.seconds['step'])} | "
            f"{p.hours:,.1f} | {c.seconds:.0f}"
        )
    return _table(
        "topology | mesh | rows per device: | questions per step: | peak GiB of HBM: | fits | largest rows per device: "
        "| TFLOP per step (with recomputation): | GB received per device: | s per step (bound): | hours: | compile s:",
        rows,
    )


def memory_table(plans: Sequence[TopologyPlan]) -> str:
    """Return the table of memory of plans of reinforcement learning."""
    rows = []
    for p in plans:
        f, peak = p.facts, p.peak
        hosts = f" on each of {f['hosts']} hosts" if f["hosts"] > 1 else ""
        caches = max(sum(n for kind, n in (c.memory or {}).items() if "cache" in kind) for c in p.phases)
        rows.append(
            f"{p.topology} | {_axes(p.mesh)} | {_axes(f['sampler_mesh'])}{hosts} | "
            f"{f['prompts']} x {f['completions']} | {f['completions_per_row']}, {f['accumulation']} | "
            f"{peak.needed / GIB:.2f} of {p.hbm / GIB:.0f} ({peak.phase.name}) | {caches / GIB:.2f} | "
            f"{'yes' if p.fits else 'no'} | about {p.largest} | {sum(c.seconds for c in p.phases):.0f}"
        )
    return _table(
        "topology | learner's mesh | sampler's mesh | prompts x completions | completions per row, micro-batches | "
        "peak GiB of HBM (in): | caches GiB: | fits: | most prompts: | compile s:",
        rows,
    )


def time_table(plans: Sequence[TopologyPlan]) -> str:
    """Return the table of seconds of plans of reinforcement learning, a line for each length of completions."""
    rows = [
        f"{p.topology} | {t.mean} ({t.longest}) | {t.flops / 1e15:.2f} | {t.received / 1e9:.1f} | "
        f"{' | '.join(map(_bound, t.seconds.values()))} | {t.step:.1f} | {p.hours * t.step / p.timings[0].step:,.0f}"
        for p in plans
        for t in p.timings
    ]
    names = " | ".join(f"{name} s:" for name in plans[0].timings[0].seconds)
    heads = "topology | tokens of a completion (longest): | PFLOP per step: | GB received per device:"
    return _table(f"{heads} | {names} | s per step: | hours:", rows)


def details(p: TopologyPlan) -> str:
    """Return memory of each phase by kind, FLOPs, collectives, kernels and findings of one topology."""
    kinds = list(dict.fromkeys(k for c in p.phases for k, n in (c.memory or {}).items() if n >= GIB / 200)) or ["peak"]
    rows, lines = [], []
    for c in p.phases:
        cells = [f"{c.memory[k] / GIB:.2f}" if c.memory and c.memory.get(k) else "" for k in kinds]
        cells[-1] = cells[-1] if c.memory else f"refused: {c.needed / GIB:.1f}"
        cells += [f"{sum(c.received.values()) / 1e9:.2f}", str(c.kernels), f"{c.seconds:.0f}"]
        rows.append(" | ".join([c.phase.name, *cells]))
        sent = ", ".join(f"{kind} {n / 1e9:.2f}" for kind, n in sorted(c.received.items())) or "none"
        lines.append(
            f"- {c.phase.name}: GB received per device: {sent}; largest gathered array {c.gathered or 'none'}; largest "
            f"arrays {', '.join(c.largest) or 'none'}"
        )
    for t in p.timings:
        bounds = (f"{name} {', '.join(f'{k} {v:.3f}' for k, v in b.items())}" for name, b in t.seconds.items())
        lines.append(f"- seconds with {t.mean} tokens: {'; '.join(bounds)} (compute at {EFFICIENCY:.0%} of peak)")
    if "flops" in p.facts:
        lines.append("- TFLOP per step: " + ", ".join(f"{k} {n / 1e12:,.1f}" for k, n in p.facts["flops"].items()))
    whole = sorted({name for c in p.phases for name in c.whole})
    lines.append(f"- all logits or all scores of a row: {', '.join(whole) or 'nowhere'}")
    if any(c.memory and not c.kernels for c in p.phases if c.phase.kind in ("step", "gradient")):
        lines.append("- the update has no attention kernel: see model.attention")
    room = f"{p.usable / GIB:.1f} of {p.hbm / GIB:.0f}"
    title = f"{p.topology}, {p.devices} devices, GiB on each by what it is for ({room} are counted as usable):\n"
    heads = " | ".join(["program", *(f"{kind}:" for kind in kinds), "GB received: | kernels: | compile s:"])
    return "\n".join((title, _table(heads, rows) + "\n", *lines, *(f"- {n}" for n in p.notes)))


def gpu_table(job: PlanJob, record: Iterable[dict[str, Any]]) -> str:
    """Return the table of the memory reckoned for GPUs, from `memory.gpu_record`."""
    rows, sampling = [], isinstance(job, GrpoJob)
    for r in record:
        phases = {phase: {kind: n / GIB for kind, n in kinds.items()} for phase, kinds in r["bytes"].items()}
        last = phases["learning" if sampling else "step"]
        activations = last["kept activations"] + last["working activations"]
        if sampling:
            drawn = phases["sampling"]
            caches = drawn["prompt cache"] + drawn["branch cache"] + drawn["cache before growth"]
            cells = [drawn["weights"], drawn[COPY], caches, sum(drawn.values()), activations, sum(last.values())]
        else:
            rest = last["batch"] + last["gathered layer"] + last["logits"] + last["exchanged head"]
            own = last["adapter, gradient, optimiser"]
            cells = [last["weights"], own, activations + last["vision"], rest, r["total"] / GIB]
        parts = [r["devices"], r["remat"], r["rows"], *(f"{cell:.2f}" for cell in cells), *r["largest"].values()]
        rows.append(" | ".join(map(str, parts)))
    what, several, most, copied = "a step", "mesh.fsdp", "rows", ""
    heads = "rows per device: | weights: | adapter, gradient, optimiser: | activations: | rest: | GiB:"
    if sampling:
        what, most = f"completions of {job.rollout.max_new_tokens} tokens", "prompts"
        several = "mesh.fsdp and of rollout.tensor"
        copied = (
            " A GPU that has room decodes with a copy of the decoder's layers: it is in the GiB of sampling where the "
            "GPU with most memory has it, and for each in the prompts that fit."
        )
        heads = "completions per row: | weights: | sampler's weights: | caches: | sampling, GiB: | activations: | "
        heads += "learning, GiB:"
    heads = " | ".join(["devices: | remat", heads, *(f"most {most}, {name}:" for name in GPUS)])
    return (
        f"Reckoned, not compiled, for {what}; several devices are those of {several}. Nine tenths of the memory "
        f"is counted as usable.{copied}\n\n{_table(heads, rows)}"
    )


def _table(heads: str, rows: Iterable[str]) -> str:
    """Return a Markdown table; a column whose head ends with a colon is aligned to the right."""
    columns = heads.split(" | ")
    names = " | ".join(column.rstrip(":") for column in columns)
    line = "|".join("---:" if column.endswith(":") else "---" for column in columns)
    return "\n".join((f"| {names} |", f"|{line}|", *(f"| {row} |" for row in rows)))


def _bound(bounds: dict[str, float]) -> str:
    return f"{max(bounds.values()):.2f} ({max(bounds, key=bounds.__getitem__)})"


def _axes(mesh: dict[str, int]) -> str:
    return " ".join(f"{name} {n}" for name, n in mesh.items() if n > 1) or "one device"
