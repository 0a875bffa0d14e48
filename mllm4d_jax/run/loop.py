"""The order of a training run, the same for every task: data, step, log, hooks, and at the end what is not saved yet.

with TrainingRun(...) as run:
    run.every(100, save, unsaved=True)
    for step, data in run.steps(take):
        run.record(...)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import ml_collections

from mllm4d_jax.files.ending import CLOSING_S, Ending, StopSignal
from mllm4d_jax.files.traffic import Traffic
from mllm4d_jax.parallel import multihost
from mllm4d_jax.run.begin import Begun
from mllm4d_jax.run.checkpoint import Checkpoints, Meta, flat_config
from mllm4d_jax.run.log import RunLog, say, write_facts
from mllm4d_jax.run.saved import take_up
from mllm4d_jax.run.watchdog import Watchdog
from mllm4d_jax.run.workdir import hold_workdir


class TrainingError(ValueError):
    """Training cannot go on; the message names the step and the records."""


def check_finite(finite: bool, step: int, loss: float, norm: float, keys: Iterable[str]) -> None:
    """Raise TrainingError if the results of a step are not finite.

    Args:
      step: from 1; `loss`, `norm`: its loss and gradient norm.
      keys: of its records.
    """
    if not finite:
        raise TrainingError(
            f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {step} is not finite (loss {loss}, gradient "
            f"norm {norm}); its records{' on this process' if jax.process_count() > 1 else ''}: "
            f"{', '.join(keys) or 'none'}. The parameters were left as they were before it, and the newest checkpoint "
            "is from before it. Look at these records, or lower optim.lr and start anew"
        )


def carry_out(
    config: ml_collections.ConfigDict,
    workdir: str,
    columns: Sequence[str],
    prepare: Callable[[ml_collections.ConfigDict, Path], ml_collections.ConfigDict],
    set_up: Callable[[ml_collections.ConfigDict, Path, Checkpoints], Any],
    train: Callable[[Any, TrainingRun], None],
    owed: Callable[[Any], bool] = lambda setup: False,
) -> int:
    """Take hold of a workdir, set a run up, train until the last step or until asked to stop, say how far it came.

    Of several processes, each that is lost or hangs is named by the others from here on (`Watchdog`).

    Args:
      workdir: the run's folder.
      columns: of the log, that the terminal shows.
      prepare: given the workdir (of one in a bucket its copy), checks the config and completes it.
      set_up: makes what `train` is given; has the run as `begun` and `facts` about it.
      train: runs the steps that are left, and saves.
      owed: whether what `train` does besides is missing where no step is left.

    Returns:
      0, also when it was asked to stop.

    Raises:
      ResumeError: no checkpoint in the folder is whole.
      SaveError: one cannot be written; LockError: another run has taken the folder over.
    """
    c, own = config.train, dict(process=jax.process_index(), processes=jax.process_count())
    with Traffic() as traffic, Watchdog(c.watchdog_s, **own) as watchdog, contextlib.ExitStack() as held:
        with watchdog.phase("taking hold of the workdir"):
            place = held.enter_context(hold_workdir(workdir))
            folder = place.home / "checkpoints"
            multihost.primary_only(lambda: take_up(folder))
        with watchdog.phase("looking for what the run needs"):
            config = prepare(config, place.path)
        kept = Checkpoints(folder, c.keep_checkpoints, c.keep_best, guard=place.check)
        with Ending(CLOSING_S) as ending, kept as checkpoints, StopSignal() as stop:
            with ending.after_errors(), watchdog.phase("opening records, loading weights and checkpoint"):
                setup = set_up(config, place.path, checkpoints)
                write_facts(place.path, setup.facts)
            done = setup.begun.progress.step
            with watchdog.phase("looking for what is left to do"):
                left = done < c.steps or owed(setup)
            if left:
                with setup.begun.encoder, TrainingRun(setup.begun, columns, stop, ending, watchdog) as run:
                    train(setup, run)
                with watchdog.phase("writing the last checkpoint"):
                    checkpoints.finish()
                say(traffic.said(run.progress.step - done))
                done = run.progress.step
    stopped = f"stopped after step {done} of {c.steps} and saved; the same command goes on from there"
    say(stopped if done < c.steps else f"{done} steps done")
    return 0


T = TypeVar("T")


@dataclasses.dataclass
class _Hook:
    """Something done after some of the steps."""

    every: int  # steps between
    call: Callable[[int], None]  # given the number of steps done
    last: bool  # also after the last step of the run
    unsaved: bool  # also after the last step, and when the run was asked to stop
    done: int  # step of the last call


class TrainingRun:
    """A run under way: where it is, what it records, and who watches it. Use as a context manager.

    Attributes:
      config, workdir: of the run.
      progress: of the last step, and the data's state after it; set by the task with every step.
      stop: true once the process was asked to stop.
      checkpoints: where it is saved.
      watchdog: is told what the process waits for.
    """

    def __init__(
        self,
        begun: Begun,
        columns: Sequence[str],
        stop: StopSignal,
        ending: Ending | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """
        Args:
          columns: of the log, that the terminal shows.
          ending: for closing down after an error.
          watchdog: at work already; None for nobody who watches.
        """
        self.config, self.workdir, self.checkpoints = begun.config, begun.workdir, begun.checkpoints
        self.progress, self.stop, self._content, self._start = begun.progress, stop, begun.content, begun.progress.step
        c = self.config.train
        self._log = RunLog(self.workdir, self.config.task, columns, c.steps, self._start, c.log_every)
        self.watchdog = watchdog or Watchdog(0)
        self._hooks: list[_Hook] = []
        self._open, self._tracing = contextlib.ExitStack(), contextlib.ExitStack()
        self._ending = ending

    def __enter__(self) -> Self:
        for part in (self._log, self._tracing):
            self._open.enter_context(part)
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.__exit__(*exc)

    def body(self) -> contextlib.AbstractContextManager[None]:
        """Return the innermost context of the steps: left by an error, it bounds the time that closing may take."""
        return contextlib.nullcontext() if self._ending is None else self._ending.after_errors()

    def every(self, n: int, call: Callable[[int], None], *, last: bool = False, unsaved: bool = False) -> None:
        """Call a function after every n-th step, in the order of the calls of this method.

        Args:
          last: after the last step of the run, too.
          unsaved: likewise after the last step, and when asked to stop, if steps were done since the last call.
        """
        self._hooks.append(_Hook(n, call, last, unsaved, self._start))

    def steps(
        self, take: Callable[[int], T | None], wait: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[int, T]]:
        """Yield (number from 1, data) of every step that is left, and trace those that the config names.

        Neighbouring steps go into one trace; look at it with `tensorboard --logdir DIR` and the package xprof, or at
        ui.perfetto.dev.

        Args:
          take: gives the data of a step, None once the run was asked to stop.
          wait: returns once the devices are done; called before a trace ends.

        Raises:
          SaveError: a checkpoint that was begun earlier cannot be written.
        """
        total, step, traced = self.config.train.steps, self._start, self.config.train.trace_steps
        while step < total and (data := take(step + 1)) is not None:
            step += 1
            if jax.process_count() == 1:  # several have to agree on this: see `sft.feed`
                self.checkpoints.check()
            if step in traced and (step - 1 not in traced or step - 1 == self._start):
                self._tracing.enter_context(jax.profiler.trace(str(self.workdir / "trace")))
            yield step, data
            if step in traced and step + 1 not in traced:
                wait()
                self._tracing.close()
            self._call(step, [h for h in self._hooks if step % h.every == 0 or (h.last or h.unsaved) and step == total])
        self._call(step, [h for h in self._hooks if h.unsaved and h.done < step])

    def _call(self, step: int, hooks: list[_Hook]) -> None:
        for hook in hooks:
            hook.call(step)
            hook.done = step

    def record(self, row: Mapping[str, float | None] | None) -> None:
        """Log the results of a step; None is no step."""
        self._log.step(row)

    def save(self, trainable: Any, opt_state: Any, loss: float, pending: Mapping[str, Any] | None = None) -> None:
        """Save the state after the last step; see `Checkpoints.save`."""
        meta = Meta(**dataclasses.asdict(self.progress), config=flat_config(self.config), content=self._content)
        with self.watchdog.phase("saving a checkpoint"):
            self.checkpoints.save(trainable, opt_state, meta, loss, pending)
