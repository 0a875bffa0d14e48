"""Runs whose data, weights and folder are in a bucket, killed and started again: the bits of an unbroken local run."""

from __future__ import annotations

import json
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm4d_jax.files import remote
from mllm4d_jax.run import saved
from mllm4d_jax.run.build import build
from mllm4d_jax.run.checkpoint import Checkpoints
from mllm4d_jax.sft import task
from tests.buckets import BUCKET, put_folder
from tests.processes import Processes, write_config

COLUMNS = ("step", "loss", "accuracy", "grad_norm", "lr", "examples", "clips", "tokens", "visual", "supervised")
FAULTS = ("429", "503", "slow", "cut")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(text: bytes) -> list[dict]:
    """Rows of a log without what depends on the clock."""
    return [{name: row[name] for name in COLUMNS} for row in map(json.loads, text.splitlines())]


def arrays(workdir, step: int, wanted) -> list[bytes]:
    with Checkpoints(remote.place(workdir) / "checkpoints", keep=1, read_only=True) as kept:
        tree = kept.restore_trainable(step, wanted)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def trainable(config):
    return build(config).trainable


def in_bucket(config, model, records, name: str):
    """The config of a run that has everything in the bucket."""
    moved = config.copy_and_resolve_references()
    world = put_folder(records.parent, f"{name}/world")
    moved.model.path = put_folder(model, f"{name}/model")
    moved.data.path, moved.data.root = f"{world}/{records.name}", world
    return moved


def test_a_run_in_a_bucket_has_the_bits_of_a_local_one(front, tiny_world, make_config, tmp_path):
    config = make_config(*tiny_world)
    moved, there = in_bucket(config, *tiny_world, "one"), f"gs://{BUCKET}/one/run"
    assert task.run(config, str(tmp_path / "run")) == 0
    front.rate, front.kinds = 0.03, FAULTS
    assert task.run(moved, there) == 0
    assert front.hit
    front.reset()
    wanted = trainable(config)
    assert rows(remote.place(f"{there}/metrics.jsonl").read_bytes()) == rows(
        (tmp_path / "run/metrics.jsonl").read_bytes()
    )
    assert arrays(there, 6, wanted) == arrays(tmp_path / "run", 6, wanted)
    assert saved.steps(remote.place(f"{there}/checkpoints")) == saved.steps(tmp_path / "run" / "checkpoints")
    front.reset()
    assert task.run(moved, there) == 0, "nothing is left to do"
    assert not [name for name in front.requests if ".mp4" in name and "GET" in name and "alt" in name]


def test_an_unfinished_checkpoint_is_removed_and_a_damaged_one_set_aside(front):
    folder = remote.place(f"gs://{BUCKET}/parts/checkpoints")
    for name in ("4/_CHECKPOINT_METADATA", "4/trainable/d/x", "5/notes.txt"):
        remote.upload(f"{folder}/{name}", b"{}")
    assert saved.steps(folder) == [5]
    saved.take_up(folder)
    assert remote.found(folder).keys() == {"aside-5/notes.txt"}


def test_a_checkpoint_that_lacks_its_last_file_alone_is_finished(front):
    folder = f"gs://{BUCKET}/last/checkpoints"
    with Checkpoints(folder, keep=3) as kept:
        for step in (3, 6):
            kept.save_trainable(step, {"a": jnp.arange(4.0)})
    commit = f"{folder}/6/commit_success.txt"
    remote.remove(commit)
    assert saved.steps(remote.place(folder)) == [3], "another run may be writing it"
    saved.take_up(remote.place(folder))
    with Checkpoints(folder, keep=3) as kept:
        assert kept.latest() == 6
        assert kept.restore_trainable(6, {"a": jnp.zeros(4)})["a"].tolist() == [0.0, 1.0, 2.0, 3.0]
    remote.remove(commit)
    data = next(name for name in remote.found(f"{folder}/6") if name.startswith("trainable/d/"))
    remote.upload(f"{folder}/6/{data}", b"damage")
    saved.take_up(remote.place(folder))
    assert saved.steps(remote.place(folder)) == [3] and remote.is_file(f"{folder}/aside-6/digests.json")
    remote.upload(f"{folder}/3/meta/metadata", b"damage")
    with pytest.raises(saved.ResumeError, match="none of the checkpoints in gs://"):
        saved.take_up(remote.place(folder))


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_bits(front, tiny_world, make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    config = make_config(*tiny_world)
    wanted_kills = 10
    config.train.steps, config.train.checkpoint_every = 3 * wanted_kills + 3, 3
    moved, there = in_bucket(config, *tiny_world, "killed"), f"gs://{BUCKET}/killed/run"
    with Processes(write_config(tmp_path / "local.py", config), tmp_path / "run") as local:
        assert local.wait(600) == [0], local.output[0].read_text()
    front.rate, front.kinds = 0.01, FAULTS
    draw, kills, file = random.Random(1), 0, write_config(tmp_path / "moved.py", moved)
    while True:
        before = len(saved.steps(remote.place(f"{there}/checkpoints")))
        with Processes(file, there, outputs=tmp_path) as run:
            if kills < wanted_kills:
                end = time.monotonic() + 120
                while time.monotonic() < end and run.running[0].poll() is None:
                    if max(saved.steps(remote.place(f"{there}/checkpoints")), default=0) >= 3 * (kills + 1):
                        break
                    time.sleep(0.2)
                time.sleep(draw.random())
                if run.running[0].poll() is None:
                    kills += 1
                    continue
            code = run.wait(600)
        assert code == [0], (before, run.output[0].read_text()[-3000:])
        break
    assert kills >= wanted_kills / 2
    front.reset()
    wanted = trainable(config)
    assert rows(remote.place(f"{there}/metrics.jsonl").read_bytes()) == rows(
        (tmp_path / "run/metrics.jsonl").read_bytes()
    )
    last = config.train.steps
    assert arrays(there, last, wanted) == arrays(tmp_path / "run", last, wanted)
