"""What tests of reinforcement learning share: a tiny model beside a tiny world."""

from __future__ import annotations

import pytest

from data_prep.sample import write_sample_world
from mllm4d_jax.run.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """(model folder, folder with r1.jsonl and its clips): 8 prompts about 2 clips, half of them of a distance."""
    folder = tmp_path_factory.mktemp("tiny")
    records = write_sample_world(folder / "world", seed=4, clips=2)
    write_tiny_model(folder / "model", [records.read_text(), (folder / "world/cold_start.json").read_text()], seed=0)
    return folder / "model", folder / "world"
