"""Supervised fine-tuning: the run itself, from preflight to report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from pathlib import Path

import jax
import ml_collections

from mllm4d_jax.data.samples import write_sample_world
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.parallel import multihost
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.run import preflight
from mllm4d_jax.run.checkpoint import Checkpoints, Meta
from mllm4d_jax.run.log import NoLog, RunLog, read_metrics, write_curve, write_report
from mllm4d_jax.run.progress import StopSignal
from mllm4d_jax.run.tiny import write_tiny_model
from mllm4d_jax.run.trace import Trace
from mllm4d_jax.run.watchdog import Watchdog
from mllm4d_jax.run.workdir import open_workdir, say
from mllm4d_jax.sft.feed import Feed
from mllm4d_jax.sft.job import Job, build

_TOKENIZER_RECORDS = 1000  # records a tiny model's tokenizer is learned from


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Trains as the config says, continuing from the workdir's newest checkpoint if there is one.

    Every process of a run over several calls this, with the same config and a workdir that they share.

    Args:
      config: every key of the "sft" task.
      workdir: gets config.json, checkpoints/, metrics.jsonl, tb/, trace/, quarantine.jsonl, curve.png and report.md.

    Returns:
      0, also when it was asked to stop (SIGINT, SIGTERM): the state is saved and the same command goes on.

    Raises:
      PreflightError: something is missing; lists everything.
      ResumeError: the workdir holds a run with other settings.
      QuarantineError: too many unusable records; FeedError on the other processes of the run.
      TrainingError: loss or gradient is not finite.
      HeldOutError: no record of data.eval_path can be used.
    """
    folder = multihost.primary_first(lambda: open_workdir(workdir))
    config = multihost.primary_first(lambda: with_sample(config, folder))
    preflight.check(config)
    c = config.train
    with Checkpoints(folder / "checkpoints", c.keep_checkpoints, c.keep_best) as checkpoints, StopSignal() as stop:
        job = build(config, folder, checkpoints)
        say("\n".join(f"{name}: {value}" for name, value in job.facts.items()))
        if job.trainer.progress.step < c.steps:
            with job.encoder:
                train(job, stop)
    done = job.trainer.progress.step
    if done < c.steps:
        say(f"stopped after step {done} of {c.steps} and saved; the same command goes on from there")
        return 0
    if multihost.is_primary():
        report(job)
    say(f"{done} steps done: see {folder / 'report.md'}")
    return 0


def with_sample(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """The config with the tiny sample in place of what is not configured; unchanged without data.sample.

    Without data of the user's own, the sample world is written; without a model, a tiny random one whose tokenizer is
    learned from the records.

    Raises:
      PreflightError: data.path or data.mixture names something that holds no records.
    """
    if not config.data.sample:
        return config
    config = config.copy_and_resolve_references()
    sample = workdir / "sample"
    if not config.data.path and not config.data.root and not preflight.mixture_entries(config):
        records = write_sample_world(sample / "world", config.seed)
        config.data.path, config.data.root = str(records), str(records.parent)
    if not config.model.path:
        problems = list(preflight.data_problems(config))
        if problems:
            raise preflight.PreflightError("; ".join(problems))
        write_tiny_model(sample / "model", record_texts(preflight.open_data(config)) + _reasoning(sample), config.seed)
        config.model.path = str(sample / "model")
    return config


def _reasoning(sample: Path) -> list[str]:
    """Answers of the sample world's cold start, so that the tokenizer of the runs to come knows their words."""
    file = sample / "world" / "cold_start.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [row["conversations"][-1]["value"] for row in rows]


def record_texts(mixture: Mixture) -> list[str]:
    """Texts of the first records, for a tokenizer; records that cannot be read are left to the loader to report."""
    texts = []
    for source in mixture.sources:
        for i in range(min(len(source), _TOKENIZER_RECORDS)):
            try:
                messages = source[i].messages
            except RecordError:
                continue
            parts = [p for m in messages for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
            texts += [
                p if isinstance(p, str) else p["text"] for p in parts if isinstance(p, str) or p["type"] == "text"
            ]
    return texts


def train(job: Job, stop: StopSignal) -> None:
    """Runs steps until the last one or until asked to stop, and saves. Raises as `run`."""
    c, trainer = job.config.train, job.trainer
    saved = trainer.progress.step
    losses = Losses(job)
    with (
        open_log(job) as run_log,
        Watchdog(c.watchdog_s) as watchdog,
        Trace(job.workdir / "trace", c.trace_steps) as trace,
        job.loader,
        Feed(job.loader, c.accumulation, job.flops, stop, watchdog) as feed,
    ):

        def record(row: dict | None, measure: bool = False) -> None:
            run_log.step(losses.note(row, watchdog) if measure else losses.note(row))

        while (step := trainer.progress.step + 1) <= c.steps:
            data = feed.next(last=step == c.steps)
            if data is None:
                break
            with watchdog.phase(f"step {step} is compiled or the devices work on step {step - 1}"):
                trace.before(step)
                record(trainer.advance(data))
                trace.after(step, lambda: jax.block_until_ready(trainer.trainable))
            to_save, last = step % c.checkpoint_every == 0, step == c.steps
            measure = job.held_out is not None and (to_save or last or step % c.eval_every == 0)
            if to_save or measure:
                with watchdog.phase(f"the devices work on step {step}"):
                    row = trainer.finish()
                record(row, measure)
            if to_save:
                save(job, losses, watchdog)
                saved = step
        with watchdog.phase("the devices work on the last step"):
            record(trainer.finish())
        if trainer.progress.step > saved:
            save(job, losses, watchdog)


def open_log(job: Job) -> RunLog | NoLog:
    """Where the steps are recorded: on the first process."""
    if not multihost.is_primary():
        return NoLog()
    c = job.config.train
    return RunLog(job.workdir, steps=c.steps, start=job.trainer.progress.step, log_every=c.log_every)


class Losses:
    """What the best checkpoints are chosen by: the newest held-out loss where there are held-out records, else the mean
    over the newest `log_every` steps.
    """

    def __init__(self, job: Job) -> None:
        """Goes on from the rows that an earlier part of the run recorded."""
        rows = read_metrics(job.workdir / "metrics.jsonl", job.trainer.progress.step)
        self._job = job
        self._recent = deque((row["loss"] for row in rows), maxlen=job.config.train.log_every)
        self._held_out = next((row["eval_loss"] for row in reversed(rows) if "eval_loss" in row), None)

    def note(self, row: dict | None, watchdog: Watchdog | None = None) -> dict | None:
        """Remembers the loss of a step; with a watchdog the held-out loss is measured and added to the row."""
        if row is None:
            return None
        self._recent.append(row["loss"])
        return row if watchdog is None else row | {"eval_loss": self._measure(watchdog)}

    def value(self, watchdog: Watchdog) -> float:
        """The one that counts; held-out records that were never looked at are measured now."""
        if self._job.held_out is None:
            return math.fsum(self._recent) / len(self._recent)
        return self._measure(watchdog) if self._held_out is None else self._held_out

    def _measure(self, watchdog: Watchdog) -> float:
        with watchdog.phase("measuring the held-out loss"):
            self._held_out = self._job.held_out(self._job.trainer.trainable)
        self._job.trainer.restart_clock()
        return self._held_out


def save(job: Job, losses: Losses, watchdog: Watchdog) -> None:
    """Saves the state after the last step."""
    meta = Meta(
        **dataclasses.asdict(job.trainer.progress), config=preflight.flat_config(job.config), content=job.content
    )
    loss = losses.value(watchdog)
    with watchdog.phase("saving"):
        job.checkpoints.save(job.trainer.trainable, job.trainer.opt_state, meta, loss)


def report(job: Job) -> None:
    """Writes curve.png and report.md from metrics.jsonl."""
    rows = read_metrics(job.workdir / "metrics.jsonl")
    write_curve(job.workdir / "curve.png", rows, f"SFT, {rows[-1]['step']} steps")
    seconds = sum(r["step_s"] for r in rows)
    facts = {
        **job.facts,
        "time in steps": f"{seconds:.0f} s, of which {sum(r['data_wait_s'] for r in rows):.0f} s waiting for data",
        "compiled steps": f"{rows[-1]['compiles']} since the last start, {rows[-1]['retraces']} of them retraces",
        "records skipped": rows[-1]["quarantined"],
    }
    measured = [row for row in rows if "eval_loss" in row]
    if measured:
        best, last = min(measured, key=lambda row: row["eval_loss"]), measured[-1]
        facts["held-out loss"] = (
            f"{measured[0]['eval_loss']:.4f} after step {measured[0]['step']}, lowest {best['eval_loss']:.4f} after "
            f"step {best['step']}, {last['eval_loss']:.4f} after step {last['step']}"
        )
    if job.config.data.sample:
        facts["what it shows"] = (
            "that the training path works here: a sample run learns a few answers by heart and measures nothing about "
            "understanding video"
        )
    write_report(job.workdir / "report.md", rows, preflight.flat_config(job.config), facts)
