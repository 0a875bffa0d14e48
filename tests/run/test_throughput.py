"""Utilisation: which peak, which FLOPs."""

from __future__ import annotations

import numpy as np
import pytest

from configs.published import published_config
from mllm4d_jax.data.steps import Counts, LoadedBatch
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.flops import Tuning
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.rows.rows import RowBatch
from mllm4d_jax.run.throughput import FlopCounter, mfu


def test_utilisation():
    assert mfu(4e12, 2.0, 4, 1e12) == 0.5
    assert mfu(4e12, 2.0, 4, None) is None


def test_padding_is_no_work_and_an_adapter_costs_two_thirds_of_full_training():
    """About 6 FLOPs per parameter and token when all is trained, 4 with frozen weights under an adapter."""
    config = ModelConfig.from_dict(published_config("8b"))

    def flops(tuning, padding=0):
        tokens = np.zeros((1, 512 + padding), np.int32)
        segments = np.zeros_like(tokens)
        segments[:, :512] = 1
        inputs = ModelInputs(tokens, np.zeros((3, *tokens.shape), np.int32), segments, tokens - 1, None)
        batch = RowBatch(inputs, *(np.zeros((1, 64)) for _ in range(3)))
        counts = Counts(examples=1, clips=1, tokens=512, slots=tokens.size, supervised=64)
        return FlopCounter(config, tuning)(LoadedBatch(batch, ("k",), 1, counts, 0.0))

    assert flops(Tuning(text=True)) == flops(Tuning(text=True), padding=512)
    decoder = 6.95e9  # parameters of the 36 layers
    assert flops(Tuning(text=True)) == pytest.approx(6 * decoder * 512, rel=0.05)
    assert flops(Tuning(rank=1, targets=("q_proj",))) == pytest.approx(4 * decoder * 512, rel=0.05)
