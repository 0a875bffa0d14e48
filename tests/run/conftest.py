"""What the tests of runs share: a tiny model folder and a sample world."""

from __future__ import annotations

import pytest

from mllm4d_jax.data.samples import write_sample_world
from mllm4d_jax.run.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """(model folder, records file): 8 questions about 2 clips."""
    folder = tmp_path_factory.mktemp("tiny")
    records = write_sample_world(folder / "world", seed=0, clips=2)
    write_tiny_model(folder / "model", [records.read_text()], seed=0)
    return folder / "model", records
