"""Supervised fine-tuning: the run itself, from preflight to report."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

import jax
import ml_collections

from mllm4d_jax.files import jsonl
from mllm4d_jax.parallel import multihost
from mllm4d_jax.report.reading import METRICS
from mllm4d_jax.run import preflight
from mllm4d_jax.run.checkpoint import Progress
from mllm4d_jax.run.loop import TrainingRun, carry_out
from mllm4d_jax.run.tiny import with_sample
from mllm4d_jax.sft.feed import StepFeed
from mllm4d_jax.sft.setup import SftSetup, set_up

COLUMNS = ("loss", "lr", "qa_per_s", "tokens_per_s_device", "mfu", "data_wait")  # that the terminal shows


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Train as the config says, continuing from the workdir's newest checkpoint if there is one.

    Every process of a run over several calls this, with the same config and a workdir that they share.

    Args:
      config: every key of the "sft" task.
      workdir: gets config.json, checkpoints/, facts.json, metrics.jsonl, tb/, trace/ and quarantine.jsonl.

    Returns:
      0, also when it was asked to stop (SIGINT, SIGTERM): the state is saved and the same command goes on.

    Raises:
      PreflightError: something is missing; lists everything.
      LockError, StorageError, SaveError: the workdir cannot be written, or another run does.
      ResumeError: the workdir holds a run with other settings, or no whole checkpoint; ClipsError: or other clips.
      StartError: what model.adapter names cannot be started from.
      QuarantineError: too many unusable records, or not a usable one (then on all processes); OtherProcessError on the
        other processes of the run.
      TrainingError: loss or gradient is not finite.
      HeldOutError: no record of data.eval_path can be used.
    """
    return carry_out(config, workdir, COLUMNS, prepare, set_up, train)


def prepare(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """Return the config with a sample for what it lacks, if it asks for one. Raises PreflightError."""
    config = multihost.primary_first(lambda: with_sample(config, workdir))
    multihost.together(lambda: preflight.check(config))
    return config


def train(setup: SftSetup, run: TrainingRun) -> None:
    """Run steps until the last one or until asked to stop, and save. Raises as `task.run`."""
    c, trainer = run.config.train, setup.trainer
    losses = Losses(run, setup.held_out is not None)

    def measure(step: int) -> None:
        with run.watchdog.phase(f"the devices work on step {step}"):
            row = trainer.finish()
        if row is not None:  # else this step was measured already
            run.record(losses.note(row | held_out_loss()))

    def held_out_loss() -> dict[str, float]:
        with run.watchdog.phase("measuring the held-out loss"):
            loss = setup.held_out(trainer.trainable, run.watchdog.progress, run.stop)
        trainer.restart_clock()
        return {} if loss is None else {"eval_loss": loss}

    def save(step: int) -> None:
        with run.watchdog.phase(f"the devices work on step {step}"):
            run.record(losses.note(trainer.finish()))
        if step == c.steps and not losses.learned:
            raise setup.loader.stream.nothing_usable()
        run.save(trainer.trainable, trainer.opt_state, losses.value)

    if setup.held_out is not None:
        run.every(c.eval_every, measure, last=True)
        run.every(c.checkpoint_every, measure)
    run.every(c.checkpoint_every, save, unsaved=True)
    feed = StepFeed(setup.loader, c.accumulation, setup.flops, run.stop, run.watchdog, run.checkpoints.check)
    with setup.loader.stream, run.body():
        wait = lambda: jax.block_until_ready(trainer.trainable)  # noqa: E731
        for step, data in run.steps(lambda step: feed.next(last=step == c.steps), wait):
            with run.watchdog.phase(f"step {step} is compiled or the devices work on step {step - 1}"):
                row = trainer.advance(step, data)
            run.progress = Progress(step, data.position, data.counts.rejected)
            run.record(losses.note(row))


class Losses:
    """What the best checkpoints are chosen by: the held-out loss after the same step where there are held-out records,
    else the mean over the newest `log_every` steps that had a usable record.

    Attributes:
      learned: a step had a usable record.
    """

    def __init__(self, run: TrainingRun, held_out: bool) -> None:
        """Go on from the rows that an earlier part of the run recorded. `held_out`: there are held-out records.

        Raises:
          JsonLinesError: one of them is damaged.
        """
        rows = jsonl.read_steps(run.workdir / METRICS, run.progress.step, measured=("loss",))
        self._recent: deque[float] = deque(maxlen=run.config.train.log_every)
        self._held_out, self._measured, self.learned = held_out, math.inf, False
        for row in rows:
            self._take(row)

    def note(self, row: dict | None) -> dict | None:
        """Remember the losses of a step's results, and return these."""
        if row is not None:
            self._take(row)
            self._measured = row.get("eval_loss", math.inf)
        return row

    def _take(self, row: dict) -> None:
        # Earlier versions wrote a loss of 0 for a step without a usable record.
        if row["loss"] is not None and row.get("examples", 1):
            self.learned = True
            self._recent.append(row["loss"])

    @property
    def value(self) -> float:
        """The loss that counts; infinity where it was not measured, and before the first usable record."""
        if self._held_out:
            return self._measured
        return math.fsum(self._recent) / len(self._recent) if self._recent else math.inf
