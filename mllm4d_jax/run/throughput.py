"""How much of the hardware a step uses: model FLOPs, peak of the device, memory."""

from __future__ import annotations

import jax

from mllm4d_jax.data.steps import LoadedBatch
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.flops import Tuning, real_work, step_flops
from mllm4d_jax.parallel.place import memory_stats


class FlopCounter:
    """FLOPs that the model needs for a batch: vision tower and decoder, forward and backward, of real tokens alone.

    Padding and what is computed again to save memory are no use to the model and do not count (`models.flops`).
    """

    def __init__(self, config: ModelConfig, tuning: Tuning) -> None:
        self._config, self._tuning = config, tuning

    def __call__(self, loaded: LoadedBatch) -> float:
        """FLOPs of this process's rows."""
        work = real_work(loaded.batch.inputs, loaded.counts.supervised)
        return step_flops(self._config, work, self._tuning).total.model


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: `flops / (seconds * devices * peak)`; None without a known peak."""
    return None if peak is None or seconds <= 0 else flops / (seconds * devices * peak)


def peak_memory_gib() -> float | None:
    """Most memory in use so far on the fullest device of this process, GiB; None where the backend does not say."""
    stats = [memory_stats(device) for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) / 2**30 if peaks else None
