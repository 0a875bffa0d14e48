"""Group-relative policy optimisation: draw completions, score them, update; the run from preflight to report."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mllm4d_jax.encode.encoder import media_identity
from mllm4d_jax.files import jsonl
from mllm4d_jax.grpo import settings
from mllm4d_jax.grpo.actor import Drawn
from mllm4d_jax.grpo.held_out import mean_rewards
from mllm4d_jax.grpo.learner import Update
from mllm4d_jax.grpo.prompts import Prompt, PromptStep, share_out
from mllm4d_jax.grpo.rollout import Rollouts
from mllm4d_jax.grpo.setup import GrpoSetup, set_up
from mllm4d_jax.parallel import multihost
from mllm4d_jax.qa.reasoning import parse
from mllm4d_jax.report.reading import COMPLETIONS, EVALS, METRICS
from mllm4d_jax.rows.completion_rows import CompletionRows, assign_rows, completion_rows
from mllm4d_jax.rows.shape import RowShape
from mllm4d_jax.run.log import say
from mllm4d_jax.run.loop import TrainingRun, carry_out, check_finite
from mllm4d_jax.run.throughput import peak_memory_gib

AGREEING = "agreeing with the other processes"  # a phase of the watchdog's
COLUMNS = ("reward", "reward/accuracy", "kl", "completion_tokens", "dead_groups", "rollouts_per_s")  # of the terminal


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Trains as the config says, continuing from the workdir's newest checkpoint if there is one.

    Every process of a run over several calls this, with the same config and a workdir that they share. Each draws and
    scores completions of its own prompts on its own devices; then all know all completions (not the frames of the
    others' prompts), so that what decides shapes is the same on each, and update the policy together.

    Args:
      config: every key of the "grpo" task.
      workdir: gets config.json, checkpoints/, start/ (the policy at the start), metrics.jsonl, completions.jsonl,
        evals.jsonl, facts.json, tb/, trace/ and quarantine.jsonl.

    Returns:
      0, also when it was asked to stop (SIGINT, SIGTERM): the state is saved and the same command goes on.

    Raises:
      PreflightError: something is missing; lists everything.
      LockError, StorageError, SaveError: the workdir cannot be written, or another run does.
      ResumeError: the workdir holds a run with other settings, or no whole checkpoint; ClipsError: or other clips.
      QuarantineError: too many unusable records.
      RewardError: a reward function misbehaves.
      OtherProcessError: that, or what another process cannot read, on the others.
      TrainingError: loss or gradient is not finite.
    """
    return carry_out(config, workdir, COLUMNS, prepare, set_up, train, GrpoSetup.owed)


def prepare(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """Return the config, looked through. Raises PreflightError."""
    multihost.together(lambda: settings.check(config))
    return config


class Rounds:
    """Completions for one step after the other, drawn when they are needed or one step ahead.

    Attributes:
      pending: drawn for a step that was not taken yet; None without any.
      started: clock when the newest step was asked for.
    """

    def __init__(self, setup: GrpoSetup, run: TrainingRun) -> None:
        self._setup, self._run = setup, run
        self.started = time.perf_counter()
        self.pending: Drawn | None = self._restored() if run.progress.step else None

    def take(self, step: int) -> Drawn | None:
        """Return the completions of step number `step`; None once asked to stop.

        `pending` is then what was drawn for a step that was not taken.
        """
        self.started = time.perf_counter()
        if self.pending is None:
            self.pending = self._draw(step - 1)
        if self.pending is None or self._asked_to_stop():
            return None
        drawn, self.pending = self.pending, None
        if self._run.config.rollout.ahead and step < self._run.config.train.steps:
            following = self._draw(step)
            if following is None:  # asked to stop meanwhile: an update now would be one that they were not drawn before
                self.pending = drawn
                return None
            self.pending = following
        return drawn

    def _asked_to_stop(self) -> bool:
        """Whether a process was. Raises SaveError, and OtherProcessError on the others, where one cannot save."""
        with self._run.watchdog.phase(AGREEING):
            multihost.together(self._run.checkpoints.check)
            return bool(multihost.gather([bool(self._run.stop)]).any())

    def _draw(self, step: int) -> Drawn | None:
        """Completions for the step after `step` steps, from the policy as it is now; None once asked to stop.

        With dynamic sampling, groups of equal rewards are replaced by others while rounds are left; what a last round
        has too many of is dropped, since it would be from an older policy in the next step.
        """
        setup, run = self._setup, self._run
        with run.watchdog.phase(f"copying the weights to sample with for step {step + 1}"):
            weights, done = setup.sampling_weights(), run.progress.step
        objective, c = setup.learner.objective, run.config.rollout
        kept: list[Drawn] = []
        for _ in range(c.max_rounds if objective.dynamic_sampling else 1):
            started = time.perf_counter()
            prompts = self._next_prompts()
            if prompts is None:
                return None
            waited = time.perf_counter() - started
            with run.watchdog.phase(f"drawing completions for step {step + 1}"):
                drawn = multihost.together(lambda: setup.actor.draw(prompts, weights, step, done, waited))  # noqa: B023
            with run.watchdog.phase(AGREEING):
                kept.append(dataclasses.replace(drawn, rollouts=drawn.rollouts.shared(setup.actor.options.pad_id)))
            if not objective.dynamic_sampling or sum(int(d.rollouts.informative.sum()) for d in kept) >= c.prompts:
                break
        last = kept[-1].rollouts
        run.progress = dataclasses.replace(run.progress, position=last.position, rejected=last.rejected)
        return kept[0] if len(kept) == 1 else self._chosen(kept, weights)

    def _chosen(self, kept: list[Drawn], weights: tuple) -> Drawn:
        """As many prompts as a step has, those with different rewards first, divided evenly over the processes."""
        count, hosts = self._run.config.rollout.prompts, jax.process_count()
        rollouts = Rollouts.join([drawn.rollouts for drawn in kept], self._setup.actor.options.pad_id)
        dull, place = ~rollouts.informative, rollouts.positions
        chosen = sorted(sorted(range(len(place)), key=lambda i: (dull[i], place[i]))[:count], key=lambda i: place[i])
        shares = share_out([i % count // (count // hosts) for i in chosen], hosts)
        found = {prompt.position: prompt for drawn in kept for prompt in drawn.prompts}
        return self._having(found, rollouts.take([chosen[i] for share in shares for i in share]), weights)

    def _having(self, found: Mapping[int, Prompt], rollouts: Rollouts, weights: tuple) -> Drawn:
        """Completions with this process's part of their prompts, those that were not found encoded anew."""
        each = len(rollouts.positions) // jax.process_count()
        mine = rollouts.positions[jax.process_index() * each :][:each]
        with self._run.watchdog.phase("encoding prompts of completions that are there"):
            prompts = self._setup.loader.having(found, mine)
            return Drawn(prompts, *self._setup.actor.prepare(prompts, weights), rollouts)

    def _next_prompts(self) -> PromptStep | None:
        with self._run.watchdog.phase("waiting for data"):
            return self._setup.loader.next_step(self._run.stop)

    def _restored(self) -> Drawn | None:
        """Completions that were drawn for the next step before the run ended."""
        stored = self._run.checkpoints.pending(self._run.progress.step)
        if stored is None:
            return None
        return self._having({}, Rollouts.from_json(stored), self._setup.sampling_weights())


def train(setup: GrpoSetup, run: TrainingRun) -> None:
    """Run steps until the last one or until asked to stop, and save. Raises as `task.run`."""
    c, state, start = run.config, setup.state, run.progress.step
    # Of the newest steps; the best checkpoints are chosen by them.
    rows = jsonl.read_steps(run.workdir / METRICS, start, numbers=("reward",))
    rewards = deque((row["reward"] for row in rows), maxlen=10)
    host, hosts = jax.process_index(), jax.process_count()
    multihost.together(lambda: rewind(run.workdir, start, host, hosts))
    completions = jsonl.of_host(run.workdir / COMPLETIONS, host)
    with setup.loader, setup.actor, setup.greedy, run.body():
        rounds = Rounds(setup, run)

        def save(step: int) -> None:
            pending = None if rounds.pending is None else rounds.pending.rollouts.to_json()
            run.save(state.trainable, state.opt_state, -float(np.mean(rewards)), pending)

        def evaluate(step: int) -> None:
            with run.watchdog.phase("evaluating on held-out prompts"):
                row = setup.held_out.run(setup.sampling_weights(), step, run.watchdog.progress, run.stop)
            found = "is left to the next start" if row is None else f"reward {row['reward']:.3f} on {row['n']} prompts"
            say(f"held-out after step {step}: {found}")

        with run.watchdog.phase(AGREEING):
            owed = setup.owed()
        if owed:
            evaluate(start)
        # First: steps that are saved are not lost with an evaluation that takes long or fails.
        run.every(c.train.checkpoint_every, save, unsaved=True)
        if setup.held_out is not None:
            run.every(c.eval.every, evaluate, last=True)
        for step, drawn in run.steps(rounds.take, lambda: jax.block_until_ready(state.trainable)):
            with run.watchdog.phase(f"the devices work on step {step}"):
                update, values = learn(setup, run, drawn)
            run.progress = dataclasses.replace(run.progress, step=step)
            row = step_row(drawn.rollouts, time.perf_counter() - rounds.started, **values)
            run.record(row)
            rewards.append(row["reward"])
            if c.train.completions_every and drawn.rollouts.step % c.train.completions_every == 0:
                jsonl.append(completions, completion_lines(drawn, np.asarray(update.advantages)))


def rewind(workdir: Path, step: int, host: int, hosts: int) -> None:
    """Cut off what an interrupted run, of any number of processes, wrote beyond a step.

    Every process cuts the file that it goes on with: of a workdir in a bucket each has a copy of its own. The first one
    cuts what nobody goes on with, too.

    Args:
      host: number of this process; hosts: how many there are.
    """
    completions = workdir / COMPLETIONS
    taken = [jsonl.of_host(completions, other) for other in range(hosts)]
    left = [file for file in jsonl.of_all_hosts(completions) if file not in taken]
    for path in (taken[host], *([] if host else [workdir / EVALS, *left])):
        jsonl.rewind(path, step)


def learn(setup: GrpoSetup, run: TrainingRun, drawn: Drawn) -> tuple[Update, dict[str, float | None]]:
    """Make one update; return it and the columns of its row.

    Raises:
      TrainingError: loss or gradient is not finite; the parameters are as they were before.
    """
    rollouts, state, started = drawn.rollouts, setup.state, time.perf_counter()
    longest, parts = rows_of(run.config, setup.actor.shape, drawn)
    state.trainable, state.opt_state, update = setup.learner.update(
        state.trainable,
        state.opt_state,
        setup.begun.parts.frozen,
        drawn.features,
        parts,
        rollouts.batch(longest),
        reference=setup.reference,
        iterations=run.config.objective.iterations,
    )
    done, metrics, gap_max = jax.device_get((update.step, update.metrics, update.gap_max))  # waits for the devices
    loss, norm = float(done.loss), float(done.grad_norm)
    check_finite(bool(done.finite), rollouts.step + 1, loss, norm, (p.key for p in drawn.prompts))
    values = {name: mean.measured for name, mean in metrics.items() if name != "reward"}
    return update, values | {
        **done.measured(loss=loss, grad_norm=norm, lr=float(setup.begun.parts.rates[rollouts.step])),
        "gap_max": None if values["gap"] is None else float(gap_max),
        "time/update": time.perf_counter() - started,
        "memory_gib": peak_memory_gib(),
        "compiles": setup.learner.compiles,
    }


def rows_of(config: ml_collections.ConfigDict, shape: RowShape, drawn: Drawn) -> tuple[int, list[CompletionRows]]:
    """Return (padded length of the longest completion, micro-batches of a step's completions).

    They are of this process's prompts, padded like those of the others, whose completions are known, too.
    """
    rollouts, per_row = drawn.rollouts, settings.completions_per_row(config)
    own = len(drawn.batch.lengths) * rollouts.branches
    lengths = rollouts.lengths.reshape(-1, own)
    shares = [assign_rows(of.reshape(-1, rollouts.branches), per_row, config.train.accumulation) for of in lengths]
    host = jax.process_index() if len(shares) > 1 else 0
    mine, tokens = slice(host * own, (host + 1) * own), rollouts.tokens[host * own : (host + 1) * own]
    parts = []
    for n, rows in enumerate(shares[host]):
        counts = [of[list(chosen)] for of, divided in zip(lengths, shares, strict=True) for _, chosen in divided[n]]
        longest, most = max(int(c.max()) for c in counts), max(int(c.sum()) for c in counts)
        slot, entries = shape.completion_sizes(longest, most)
        laid = completion_rows(drawn.batch, rows, tokens, rollouts.lengths[mine], slot=slot, entries=entries)
        parts.append(laid._replace(completions=laid.completions + np.int32(mine.start)))
    return shape.completion_sizes(int(rollouts.lengths.max()), 1)[0], parts


def step_row(rollouts: Rollouts, step_s: float, **values: float | None) -> dict[str, float | None]:
    """Return the row of one step for metrics.jsonl.

    Args:
      rollouts: of the step.
      step_s: seconds of the whole step.
      values: further columns.
    """
    spread = {f"reward_std/{n}": float(np.std([r[n] for r in rollouts.rewards])) for n in rollouts.rewards[0]}
    tokens = int(rollouts.lengths.sum())
    return {
        "step": rollouts.step + 1,
        **mean_rewards(rollouts.rewards),
        **spread,
        "completion_tokens": tokens / len(rollouts.lengths),
        "completion_tokens_max": int(rollouts.lengths.max()),
        "staleness": rollouts.step - rollouts.policy_step,
        "step_s": step_s,
        **{f"time/{name}": seconds for name, seconds in rollouts.seconds.items()},
        **rollouts.counts,
        "rollouts_per_s": len(rollouts.lengths) / step_s,
        "tokens_per_s": tokens / step_s,
        "position": rollouts.position,
        "quarantined": rollouts.rejected,
        **values,
    }


def completion_lines(drawn: Drawn, advantages: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield this process's completions as lines of completions.jsonl: what was asked, what it says, how it was judged.

    Args:
      drawn: of a step; advantages: f32[C] of all its completions.
    """
    rollouts, own = drawn.rollouts, len(drawn.prompts) * drawn.rollouts.branches
    first = jax.process_index() * own
    for i, (text, rewards) in list(enumerate(zip(rollouts.texts, rollouts.rewards, strict=True)))[first : first + own]:
        number, branch = divmod(i - first, rollouts.branches)
        prompt, parsed = drawn.prompts[number], parse(text)
        solution = prompt.record.solution
        yield {
            "key": prompt.key,
            "question": prompt.question,
            "media": [name for _, name in media_identity(prompt.record)],
            "completion": text,
            "rewards": dict(rewards),
            "total": rewards["total"],
            "answer": parsed.answer or None,
            "solution": solution[0] if isinstance(solution, list) and len(solution) == 1 else solution,
            "camera": [None if c is None else list(c) for c in parsed.camera_centers],
            "object": [None if c is None else list(c) for c in parsed.object_centers],
            "step": rollouts.step + 1,
            "branch": branch,
            "finish": rollouts.finish[i],
            "tokens": int(rollouts.lengths[i]),
            "advantage": float(advantages[i]),
        }
