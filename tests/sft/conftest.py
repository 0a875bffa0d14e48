"""What all training tests share: a tiny model folder, a sample world and one config, so that steps compile once."""

from __future__ import annotations

import json

import pytest

from configs import sft as sft_config
from mllm4d_jax.data.samples import write_sample_world
from mllm4d_jax.run.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """(model folder, records file): 8 questions about 2 clips."""
    folder = tmp_path_factory.mktemp("tiny")
    records = write_sample_world(folder / "world", seed=0, clips=2)
    write_tiny_model(folder / "model", [records.read_text()], seed=0)
    return folder / "model", records


@pytest.fixture(scope="session")
def mixed_world(tiny_world):
    """The tiny world with two unusable records among its own, at 2 and at 7."""
    folder, path = tiny_world
    records = json.loads(path.read_text())
    records.insert(2, {"video": "videos/absent.mp4", "conversations": records[0]["conversations"]})
    records.insert(7, {"video": "videos/clip_000.mp4", "conversations": [{"from": "judge", "value": "x"}]})
    mixed = path.parent / "mixed.json"
    mixed.write_text(json.dumps(records))
    return folder, mixed


@pytest.fixture(scope="session")
def make_config():
    """Returns a function of (model folder, records file): six steps of eight rows."""

    def make(folder, path):
        config = sft_config.get_config("tiny")
        config.data.sample = ""
        config.model.path, config.data.path, config.data.root = str(folder), str(path), str(path.parent)
        config.data.max_quarantine_rate = 0.5
        config.data.prefix_buckets = (128, 512)
        config.video.num_frames = 4
        config.train.batch_size = 8
        config.train.steps = 6
        config.train.checkpoint_every = 4
        return config

    return make
