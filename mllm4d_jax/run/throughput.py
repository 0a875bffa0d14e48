"""How much of the hardware a step uses: model FLOPs, peak of the device, memory."""

from __future__ import annotations

import jax

from mllm4d_jax.data.steps import LoadedBatch
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.flops import Tuning, real_work, step_flops
from mllm4d_jax.parallel.topology import CHIPS

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets; the first entry whose name is part of the
# device's kind counts. TPUs that can be planned for have their figures in `parallel.topology`.
_PEAKS = (
    ("tpu v4", 275e12),
    ("tpu v5 lite", CHIPS["v5e"].flops),
    ("tpu v5e", CHIPS["v5e"].flops),
    ("tpu v5", CHIPS["v5p"].flops),  # v5p calls itself "TPU v5" or "TPU v5p"
    ("tpu v6", CHIPS["v6e"].flops),
    ("tpu7x", CHIPS["tpu7x"].flops),
    ("b200", 2250e12),
    ("h200", 989.5e12),
    ("h100 pcie", 756e12),
    ("h100", 989.5e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("l4", 121e12),
    ("v100", 125e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device, None for a kind that is not in the table, such as a CPU."""
    kind = device_kind.lower()
    return next((peak for name, peak in _PEAKS if name in kind), None)


class FlopCounter:
    """FLOPs that the model needs for a batch: vision tower and decoder, forward and backward, of real tokens alone.

    Padding and what is computed again to save memory are no use to the model and do not count (`models.flops`).
    """

    def __init__(self, config: ModelConfig, tuning: Tuning) -> None:
        self._config, self._tuning = config, tuning

    def __call__(self, loaded: LoadedBatch) -> float:
        """FLOPs of this process's rows."""
        work = real_work(loaded.batch.inputs, loaded.supervised)
        return step_flops(self._config, work, self._tuning).total.model


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: `flops / (seconds * devices * peak)`; None without a known peak."""
    return None if peak is None or seconds <= 0 else flops / (seconds * devices * peak)


def peak_memory_gib() -> float | None:
    """Most memory in use so far on the fullest device of this process, GiB; None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) / 2**30 if peaks else None
