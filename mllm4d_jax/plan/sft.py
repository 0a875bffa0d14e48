"""Fine-tuning on a topology: the one program of a step, and how many rows of it a device can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax

from mllm4d_jax.models.flops import StepFlops, padded_work, pass_bytes, passes, step_flops
from mllm4d_jax.parallel.place import local_bytes, placed_rows, repeated
from mllm4d_jax.parallel.rules import batch_shards
from mllm4d_jax.plan.compile import Compiled, Phase, Phases, PhaseWork, held_by
from mllm4d_jax.plan.job import PlanJob
from mllm4d_jax.run.build import build
from mllm4d_jax.run.preflight import uneven_rows
from mllm4d_jax.sft.setup import train_step

SEARCH = 2  # further compilations to find the largest batch


class SftPhases:
    """The step of a run on the devices of a topology.

    Attributes:
      job: what is planned.
      parts: of the run; mesh: its devices.
      rows: of a micro-batch on each device.
      lengths: tokens of a mean answer -> of the longest.
      notes: what differs from the config.
    """

    def __init__(self, job: PlanJob, devices: Sequence[jax.Device]) -> None:
        """Raises MeshError where the configured mesh does not fit the devices."""
        self.job, self.parts = job, build(job.config, devices=devices, abstract=True)
        self.mesh, shards = self.parts.mesh, batch_shards(self.parts.mesh)
        self.lengths = {job.lengths.answer: job.lengths.answer}
        self.rows = -(-job.rows // shards)
        uneven = uneven_rows(job.config, job.rows, shards)
        self.notes = tuple(f"{problem}; planned with {self.rows * shards}" for problem in uneven)

    def phases(self) -> Phases:
        """Yield the step."""
        yield self.step(self.rows)

    def step(self, rows: int) -> Phase:
        """Return the step of a micro-batch with `rows` rows on each device."""
        parts, trees = self.parts, (self.parts.trainable, self.parts.opt_state)
        one = self.job.shape.collate([[]], self.job.sizes)
        batch = placed_rows(repeated(one, rows * batch_shards(self.mesh)), self.mesh)
        program = partial(train_step(parts, *trees).lower, *trees, parts.frozen, batch)
        held = held_by(parts) | {"batch": local_bytes(batch)}
        if self.job.config.train.accumulation > 1:  # the sum of gradients that the next micro-batch is added to
            held["gradient"] = local_bytes(parts.trainable)
        return Phase("step", "step", program, held, rows, self.job.sizes.layout.size)

    def calls(self, mean: int) -> Iterator[PhaseWork]:
        """Yield what the step has to do; answers of `mean` tokens are in the sizes of its rows already."""
        job, model = self.job, self.job.config.model
        tokens = self.rows * job.sizes.layout.size
        traffic = passes(model.remat) * pass_bytes(job.model.text, job.item, self.mesh.shape["tensor"], tokens)
        yield PhaseWork("step", "step", job.config.train.accumulation, self._flops().total.hardware, traffic)

    def facts(self) -> dict[str, Any]:
        """Return the questions and FLOPs of a step over all devices."""
        micro, flops, shape = self.job.config.train.accumulation, self._flops(), self.job.shape
        return dict(
            questions=self.rows * batch_shards(self.mesh) * shape.clips * shape.branches * micro,
            model_flops=micro * flops.total.model,
            flops={f.name: micro * getattr(flops, f.name).hardware for f in dataclasses.fields(flops)},
        )

    def _flops(self) -> StepFlops:
        """Return the FLOPs of a micro-batch over all devices."""
        s, rows = self.job.sizes, self.rows * batch_shards(self.mesh)
        work = padded_work(s.layout, rows, rows * s.frames, s.frame_patches, rows * s.supervised)
        return step_flops(self.job.model, work, self.parts.tuning)

    def largest(
        self, compiled: Sequence[Compiled], limit: int, compile_other: Callable[[Phase], Compiled] | None
    ) -> tuple[int, str]:
        """Return the most rows of a device and how certain they are, see `TopologyPlan`.

        Args:
          limit: bytes of a device that programs can have.
          compile_other: to look at other batches; None only reckons.
        """
        if compile_other is None:
            return max(0, _guess(compiled, limit)), "estimated"
        return search(lambda rows: compile_other(self.step(rows)), compiled[0], limit)


def search(compile_rows: Callable[[int], Compiled], first: Compiled, limit: int) -> tuple[int, str]:
    """Return the most rows of a device that were seen to fit, and how certain that is; compile at most `SEARCH` times.

    Memory is nearly a straight line over the rows, so each guess is where the line through what is known meets the
    limit. Before there is a second point, all but the weights and their like is taken to grow with the rows.
    """
    tried = [first]
    good, bad = 0, None
    for _ in range(SEARCH + 1):
        good = max((c.phase.rows for c in tried if c.fits(limit)), default=0)
        bad = min((c.phase.rows for c in tried if not c.fits(limit)), default=None)
        if bad == good + 1 or len(tried) > SEARCH:
            break
        guess = max(_guess(tried, limit), good + 1)
        if any(c.phase.rows == guess for c in tried):
            guess += 1
        tried.append(compile_rows(guess if bad is None else min(guess, bad - 1)))
    return good, "seen" if bad == good + 1 else "at least"


def _guess(tried: Sequence[Compiled], limit: int) -> int:
    points = sorted((c.phase.rows, c.needed) for c in tried if c.needed)
    r1, n1 = points[-1]
    if len(points) > 1:
        r0, n0 = points[0]
        slope = (n1 - n0) / (r1 - r0)
    else:
        memory = tried[0].memory
        fixed = sum(memory[kind] for kind in ("frozen", "trainable", "optimiser")) if memory else 0
        slope = (n1 - fixed) / r1
    return math.floor(r1 + (limit - n1) / max(slope, 1.0))
