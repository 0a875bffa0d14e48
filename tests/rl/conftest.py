"""What tests of reinforcement learning share: a compilation cache, and a tiny model beside a tiny world."""

from __future__ import annotations

import jax
import pytest

from mllm4d_jax.data.samples import write_sample_world
from mllm4d_jax.train.tiny import write_tiny_model


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Tests that build the same run again find its programs compiled."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.5)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """(model folder, folder with r1.jsonl and its clips): 8 prompts about 2 clips."""
    folder = tmp_path_factory.mktemp("tiny")
    records = write_sample_world(folder / "world", seed=0, clips=2)
    write_tiny_model(folder / "model", [records.read_text(), (folder / "world/cold_start.json").read_text()], seed=0)
    return folder / "model", folder / "world"
