"""Group-relative policy optimisation: draw completions, score them, update; the run from preflight to report."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from typing import Any

import jax
import ml_collections
import numpy as np

from mllm4d_jax.data.prefetch import Prefetcher
from mllm4d_jax.grpo import settings
from mllm4d_jax.grpo.actor import Drawn
from mllm4d_jax.grpo.job import Job, build
from mllm4d_jax.grpo.learner import Update
from mllm4d_jax.grpo.log import CompletionLog, line, step_row, summary
from mllm4d_jax.grpo.prompts import PromptStep
from mllm4d_jax.grpo.report import report
from mllm4d_jax.grpo.rollout import Rollouts
from mllm4d_jax.rows.completion_rows import CompletionRows, assign_rows, completion_rows
from mllm4d_jax.run import preflight
from mllm4d_jax.run.checkpoint import Checkpoints, Meta
from mllm4d_jax.run.log import RunLog, read_metrics
from mllm4d_jax.run.progress import StopSignal, TrainingError
from mllm4d_jax.run.throughput import peak_memory_gib
from mllm4d_jax.run.trace import Trace
from mllm4d_jax.run.watchdog import Watchdog
from mllm4d_jax.run.workdir import open_workdir, say


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Trains as the config says, continuing from the workdir's newest checkpoint if there is one.

    Args:
      config: every key of the "grpo" task.
      workdir: gets config.json, checkpoints/, start/ (the policy at the start), metrics.jsonl, completions.jsonl,
        evals.jsonl, tb/, trace/, quarantine.jsonl, curve.png and report.md.

    Returns:
      0, also when it was asked to stop (SIGINT, SIGTERM): the state is saved and the same command goes on.

    Raises:
      PreflightError: something is missing; lists everything.
      ResumeError: the workdir holds a run with other settings.
      QuarantineError: too many unusable records.
      RewardError: a reward function misbehaves.
      TrainingError: loss or gradient is not finite.
    """
    folder = open_workdir(workdir)
    settings.check(config)
    c = config.train
    with Checkpoints(folder / "checkpoints", c.keep_checkpoints, c.keep_best) as checkpoints, StopSignal() as stop:
        job = build(config, folder, checkpoints)
        say("\n".join(f"{name}: {value}" for name, value in job.facts.items()))
        if job.state.progress.step < c.steps:
            with job.encoder:
                Loop(job, stop).run()
    done = job.state.progress.step
    if done < c.steps:
        say(f"stopped after step {done} of {c.steps} and saved; the same command goes on from there")
        return 0
    report(folder, preflight.flat_config(config), job.facts)
    say(f"{done} steps done: see {folder / 'report.md'}")
    return 0


class Loop:
    """Steps of a run until the last one, or until asked to stop."""

    def __init__(self, job: Job, stop: StopSignal) -> None:
        self.job, self._stop = job, stop
        self._rewards: deque[float] = deque(maxlen=10)  # of the newest steps; the best checkpoints are chosen by them
        self._pending: Drawn | None = None
        self._clock = time.perf_counter()

    def run(self) -> None:
        """Trains and saves. Raises as `grpo.run`."""
        job, c = self.job, self.job.config.train
        start = job.state.progress.step
        if start:
            self._rewards.extend(row["reward"] for row in read_metrics(job.workdir / "metrics.jsonl", start)[-10:])
            self._pending = self._restored(start)
        if job.held_out is not None:
            job.held_out.rewind(start)
        how = dict(steps=c.steps, start=start, log_every=c.log_every, name="grpo", summarize=summary, line=line)
        with (
            RunLog(job.workdir, **how) as self._log,
            CompletionLog(job.workdir / "completions.jsonl", start, c.completions_every) as self._texts,
            Watchdog(c.watchdog_s) as self._watchdog,
            Trace(job.workdir / "trace", c.trace_steps) as trace,
            job.loader,
            job.actor,
            Prefetcher(job.loader.next_step) as self._ahead,
        ):
            saved = start
            self._evaluate(start)
            while job.state.progress.step < c.steps and (drawn := self._next()) is not None:
                step = job.state.progress.step + 1
                trace.before(step)
                self._step(drawn)
                trace.after(step, lambda: jax.block_until_ready(job.state.trainable))
                self._evaluate(step)
                if step % c.checkpoint_every == 0:
                    self._save()
                    saved = step
            if job.state.progress.step > saved:
                self._save()

    def _next(self) -> Drawn | None:
        """Completions of the next step; None once asked to stop."""
        self._clock = time.perf_counter()
        if self._pending is None:
            self._pending = self._draw(self.job.state.progress.step)
        if self._stop or self._pending is None:
            return None
        drawn, self._pending = self._pending, None
        step = drawn.rollouts.step
        if self.job.config.rollout.ahead and step + 1 < self.job.config.train.steps:
            following = self._draw(step + 1)
            if following is None:  # asked to stop meanwhile: an update now would be one that they were not drawn before
                self._pending = drawn
                return None
            self._pending = following
        return drawn

    def _draw(self, step: int) -> Drawn | None:
        """Completions for a step from the policy as it is now; with dynamic sampling, from several rounds of prompts.

        Groups of equal rewards are then replaced by others while rounds are left; what a last round has too many of is
        dropped, since it would be from an older policy in the next step.
        """
        job = self.job
        weights, done = job.sampling_weights(), job.state.progress.step
        objective, c = job.learner.objective, job.config.rollout
        kept: list[Drawn] = []
        for _ in range(c.max_rounds if objective.dynamic_sampling else 1):
            started = time.perf_counter()
            found = self._prompts()
            if found is None:
                return None
            with self._watchdog.phase(f"drawing completions for step {step + 1}"):
                drawn = job.actor.draw(found, weights, step, done, time.perf_counter() - started)
            kept.append(drawn)
            if not objective.dynamic_sampling or sum(int(d.rollouts.informative.sum()) for d in kept) >= c.prompts:
                break
        last = kept[-1].rollouts
        job.state.progress = dataclasses.replace(job.state.progress, position=last.position, rejected=last.rejected)
        return kept[0] if len(kept) == 1 else self._chosen(kept)

    def _chosen(self, kept: list[Drawn]) -> Drawn:
        """As many prompts as a step has, those with different rewards first."""
        job = self.job
        rollouts = Rollouts.join([drawn.rollouts for drawn in kept], job.actor.options.pad_id)
        prompts = [prompt for drawn in kept for prompt in drawn.prompts]
        order = np.argsort(~rollouts.informative, kind="stable")[: job.config.rollout.prompts]
        chosen = sorted(int(i) for i in order)
        picked = tuple(prompts[i] for i in chosen)
        return Drawn(picked, *job.actor.prepare(picked), rollouts.take(chosen))

    def _prompts(self) -> PromptStep | None:
        with self._watchdog.phase("waiting for data"):
            while not self._stop:
                found = self._ahead.poll(timeout=0.2)
                if found is not None:
                    return found
        return None

    def _step(self, drawn: Drawn) -> None:
        """One update and everything that is written down about it."""
        job, rollouts, state = self.job, drawn.rollouts, self.job.state
        started = time.perf_counter()
        with self._watchdog.phase(f"the devices work on step {rollouts.step + 1}"):
            longest, parts = rows_of(job, drawn)
            state.trainable, state.opt_state, update = job.learner.update(
                state.trainable,
                state.opt_state,
                job.frozen,
                drawn.features,
                parts,
                rollouts.batch(longest),
                reference=job.reference,
                iterations=job.config.objective.iterations,
            )
            values = _read(update)
        if not bool(update.step.finite):
            raise TrainingError(
                f"the loss or gradient of step {rollouts.step + 1} is not finite (loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}); its records: {', '.join(p.key for p in drawn.prompts)}. The parameters were "
                "left as they were before it. Look at these records, or lower optim.lr and start anew"
            )
        state.progress = dataclasses.replace(state.progress, step=rollouts.step + 1)
        now = time.perf_counter()
        row = step_row(
            rollouts,
            now - self._clock,
            **values,
            **{"time/update": now - started, "lr": float(job.rates[rollouts.step]), "memory_gib": peak_memory_gib()},
            compiles=job.learner.compiles,
        )
        self._log.step(row)
        self._rewards.append(row["reward"])
        self._texts.write(drawn.prompts, rollouts, np.asarray(update.advantages))

    def _evaluate(self, step: int) -> None:
        job, c = self.job, self.job.config
        last = step == c.train.steps
        if job.held_out is None or not (step % c.eval.every == 0 or last) or job.held_out.done(step):
            return
        with self._watchdog.phase("evaluating on held-out prompts"):
            row = job.held_out.run(job.sampling_weights(), step)
        say(f"held-out after step {step}: reward {row['reward']:.3f} on {row['n']} prompts")

    def _save(self) -> None:
        job, state = self.job, self.job.state
        meta = Meta(**dataclasses.asdict(state.progress), config=preflight.flat_config(job.config), content=job.content)
        pending = None if self._pending is None else self._pending.rollouts.to_json()
        with self._watchdog.phase("saving"):
            job.checkpoints.save(state.trainable, state.opt_state, meta, -float(np.mean(self._rewards)), pending)

    def _restored(self, step: int) -> Drawn | None:
        """Completions that were drawn for the next step before the run ended."""
        stored = self.job.checkpoints.pending(step)
        if stored is None:
            return None
        rollouts = Rollouts.from_json(stored)
        prompts = self.job.loader.again(rollouts.positions)
        return Drawn(prompts, *self.job.actor.prepare(prompts), rollouts)


def rows_of(job: Job, drawn: Drawn) -> tuple[int, list[CompletionRows]]:
    """(padded length of the longest completion, micro-batches of a step's completions)."""
    rollouts, side = drawn.rollouts, job.actor.side
    per_row = job.config.learner.completions_per_row or rollouts.branches
    lengths = rollouts.lengths.reshape(-1, rollouts.branches)
    parts = []
    for rows in assign_rows(lengths, per_row, job.config.train.accumulation):
        counts = [[int(rollouts.lengths[c]) for c in chosen] for _, chosen in rows]
        slot, entries = side.completion_sizes(max(map(max, counts)), max(map(sum, counts)))
        how = dict(slot=slot, entries=entries)
        parts.append(completion_rows(drawn.batch, rows, rollouts.tokens, rollouts.lengths, **how))
    return side.completion_sizes(int(rollouts.lengths.max()), 1)[0], parts


def _read(update: Update) -> dict[str, float]:
    """The device's numbers; waits for them."""
    step, metrics, gap_max = jax.device_get((update.step, update.metrics, update.gap_max))
    values: dict[str, Any] = {name: float(mean.value) for name, mean in metrics.items() if name != "reward"}
    return values | {"loss": float(step.loss), "grad_norm": float(step.grad_norm), "gap_max": float(gap_max)}
