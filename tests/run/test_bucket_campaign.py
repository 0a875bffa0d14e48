"""Runs whose data, weights and folder are in a bucket, killed and started again: the bits of an unbroken local run."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from mllm4d_jax.files import remote
from mllm4d_jax.run import saved
from mllm4d_jax.run.checkpoint import Checkpoints
from mllm4d_jax.sft import task
from tests.bucket_runs import FAULTS, killed, rows, whole
from tests.buckets import BUCKET, put_folder
from tests.grpo.grpo_cases import final, same_bits


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    assert rows(there) == rows(tmp_path / "run")
    same_bits(final(there), final(tmp_path / "run"))
    assert saved.steps(remote.place(f"{there}/checkpoints")) == saved.steps(tmp_path / "run" / "checkpoints")
    front.reset()
    assert task.run(moved, f"gs://{BUCKET}/one/again") == 0
    assert not [name for name in front.requests if ".mp4" in name], "a cached clip was asked for"
    assert rows(f"gs://{BUCKET}/one/again") == rows(there)


def test_an_unfinished_checkpoint_is_removed_and_a_damaged_one_set_aside(front):
    folder = remote.place(f"gs://{BUCKET}/parts/checkpoints")
    names = ("4/_CHECKPOINT_METADATA", "4/trainable/d/x", "5/notes.txt", "6/opt/array_metadatas/process_0")
    for name in names:  # the description of a checkpoint, too, may be written later than others of its files
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
def test_killed_ten_times_it_ends_in_the_same_bits(front, tiny_world, make_config, tmp_path, monkeypatch):
    """One request in ten goes wrong, all the time."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    config = make_config(*tiny_world)
    config.train.steps, config.train.checkpoint_every = 80, 2
    moved, there = in_bucket(config, *tiny_world, "killed"), f"gs://{BUCKET}/killed/run"
    whole(config, str(tmp_path / "run"), tmp_path, "local")
    front.rate, front.kinds = 0.1, FAULTS
    killed(moved, there, tmp_path, "moved", 10)
    assert front.hit > 100
    front.reset()
    assert rows(there) == rows(tmp_path / "run") and len(rows(there)) == 80
    same_bits(final(there), final(tmp_path / "run"))
