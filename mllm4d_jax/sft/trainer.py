"""The state of a run while it trains, one step at a time."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import jax
import numpy as np

from mllm4d_jax.run.optimizer import StepMetrics
from mllm4d_jax.run.progress import TrainingError
from mllm4d_jax.run.throughput import mfu, peak_memory_gib
from mllm4d_jax.sft.feed import StepData
from mllm4d_jax.sft.step import TrainStep

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Running:
    """A step that was sent to the device and whose results were not read yet."""

    step: int
    data: StepData
    metrics: StepMetrics


class Trainer:
    """Trained parameters and optimiser state; advances them step by step.

    The host reads the results of a step while the device works on the next one.

    Attributes:
      trainable, opt_state: trees on the devices.
      frozen: tree that is not trained.
    """

    def __init__(
        self,
        train_step: TrainStep,
        frozen: Any,
        trainable: Any,
        opt_state: Any,
        rates: np.ndarray,
        peak: float | None = None,
    ) -> None:
        """
        Args:
          train_step: the compiled step.
          frozen, trainable, opt_state: its trees.
          rates: f32[steps] learning rate of every step.
          peak: FLOP/s of a device, None when not known.
        """
        self.trainable, self.opt_state, self.frozen = trainable, opt_state, frozen
        self._step, self._rates, self._peak = train_step, rates, peak
        self._running: _Running | None = None
        self._clock = time.perf_counter()

    def advance(self, step: int, data: StepData) -> dict[str, float | None] | None:
        """Start a step (numbered from 1) and return the results of the one before it (None for the first).

        Raises:
          TrainingError: loss or gradient of the step before was not finite; the trees are as they were before it.
        """
        self.trainable, self.opt_state, metrics = self._step(
            self.trainable, self.opt_state, self.frozen, data.batches, step - 1
        )
        before, self._running = self._running, _Running(step, data, metrics)
        return self._read(before) if before else None

    def finish(self) -> dict[str, float | None] | None:
        """Results of the step under way, None when there is none. Raises as `advance`."""
        running, self._running = self._running, None
        return self._read(running) if running else None

    def restart_clock(self) -> None:
        """Leaves the time since the last results out of the next step's: something other than steps was done."""
        self._clock = time.perf_counter()

    def _read(self, running: _Running) -> dict[str, float | None]:
        data, m, counts = running.data, running.metrics, running.data.counts
        loss, norm = float(m.loss), float(m.grad_norm)
        if not bool(m.finite):
            what = "loss" if not np.isfinite(loss) else "gradient"
            raise TrainingError(
                f"the {what} of step {running.step} is not finite (loss {loss}, gradient norm {norm}); its records"
                f"{' on this process' if jax.process_count() > 1 else ''}: {', '.join(data.keys) or 'none'}. The "
                "parameters were left as they were before it, and the newest checkpoint is from before it. Look at "
                "these records, or lower optim.lr and start anew"
            )
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        return {
            "step": running.step,
            "loss": loss,
            "accuracy": float(m.accuracy),
            "grad_norm": norm,
            "lr": float(self._rates[running.step - 1]),
            "step_s": elapsed,
            "data_wait_s": data.waited,
            "examples": counts.examples,
            "clips": counts.clips,
            "tokens": counts.tokens,
            "visual": counts.visual,
            "supervised": counts.supervised,
            "padding": 1 - counts.tokens / counts.slots,
            "mfu": mfu(counts.gflops * 1e9, elapsed, self._step.mesh.size, self._peak),
            "memory_gib": peak_memory_gib(),
            "devices": self._step.mesh.size,
            "position": data.position,
            "quarantined": counts.rejected,
            "compiles": self._step.compiles,
            "retraces": self._step.retraces,
        }
