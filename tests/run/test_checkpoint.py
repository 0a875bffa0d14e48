"""Saving, restoring and refusing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mllm4d_jax import __version__
from mllm4d_jax.files.lock import LockError
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.run import saved
from mllm4d_jax.run.checkpoint import Checkpoints, Meta, SaveError, check_resumable
from mllm4d_jax.run.optimizer import init_optimizer, make_optimizer
from mllm4d_jax.run.saved import ResumeError, take_up

META = Meta(5, 40, 2, {"task": "sft", "optim.lr": 0.1, "lora.targets": ["q", "k"]}, {"data.path": "abc"})


def make_state(mesh, *axes):
    rng = np.random.default_rng(0)
    lora = {"stacks": {0: {"a": rng.normal(size=(2, 8, 4)), "b": rng.normal(size=(2, 4, 8))}}}
    lora = jax.tree.map(
        lambda x: jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, PartitionSpec(*axes))), lora
    )
    optimizer = make_optimizer(np.ones(9), b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    state = init_optimizer(optimizer, lora, mesh)
    _, state = jax.jit(optimizer.update)(lora, state, lora)
    return lora, state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_round_trip_keeps_every_bit_and_the_newest(tmp_path):
    mesh = make_mesh({"data": -1})
    lora, state = make_state(mesh)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 3, 5):
            checkpoints.save(lora, state, Meta(step, *(40, 2), META.config, META.content), 1.0)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() == 5
        assert checkpoints.meta(5) == META
        blank = jax.tree.map(jnp.zeros_like, (lora, state))
        blank = jax.device_put(blank, jax.tree.map(lambda x: x.sharding, (lora, state)))
        assert_same(checkpoints.restore(5, *blank), (lora, state))
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["3", "5"]


def test_what_is_saved_may_be_donated_at_once(tmp_path):
    mesh = make_mesh({"data": -1})
    lora, state = make_state(mesh)
    want = jax.tree.map(np.array, lora)
    overwrite = jax.jit(lambda x: jax.tree.map(lambda v: v * 0 - 7, x), donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(lora, state, META, 1.0)
        gone = overwrite(lora)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        restored, _ = checkpoints.restore(5, gone, state)
    assert_same(restored, want)


def test_restores_onto_another_mesh(tmp_path):
    lora, state = make_state(make_mesh({"data": -1}))
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(lora, state, META, 1.0)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    template = make_state(mesh, None, "fsdp")
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        restored = checkpoints.restore(5, *template)
    assert_same(restored, (lora, state))
    assert restored[0]["stacks"][0]["a"].sharding.spec == PartitionSpec(None, "fsdp")


def test_another_adapter_is_refused(tmp_path):
    lora, state = make_state(make_mesh({"data": -1}))
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(lora, state, META, 1.0)
    names = lora["stacks"][0]
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        for other in ({"a": names["a"]}, {**names, "c": names["a"]}, {**names, "b": names["b"][:, :2]}):
            with pytest.raises(ResumeError, match=r"do not fit the model: stacks\.0\.[bc]: stored"):
                checkpoints.restore(5, {"stacks": {0: other}}, state)


def test_a_different_run_is_refused_by_key():
    config = {
        "task": "sft",
        "optim.lr": 0.1,
        "lora.targets": ["q", "k"],
        "train.log_every": 7,  # free
        "data.path": "/elsewhere/r.json",  # same content
    }
    check_resumable(META, config, {"data.path": "abc"}, "w")
    with pytest.raises(ResumeError) as caught:
        check_resumable(META, config | {"optim.lr": 0.2, "lora.rank": 8}, {"data.path": "xyz"}, "w/checkpoints")
    text = str(caught.value)
    assert "optim.lr: was 0.1, is 0.2" in text and "lora.rank: was '(not there)', is 8" in text
    # A run of a version without a key did what its default says.
    check_resumable(META, config | {"model.step": -1}, {"data.path": "abc"}, "w")
    with pytest.raises(ResumeError, match=r"model.step: was '\(not there\)', is 3"):
        check_resumable(META, config | {"model.step": 3}, {"data.path": "abc"}, "w")
    assert "data.path: the content is not the same" in text and "/elsewhere/r.json" in text
    assert "w/checkpoints" in text and "step 5" in text and "lora.targets" not in text and "log_every" not in text


def test_held_out_records_stay_the_same_while_checkpoints_are_compared_by_them():
    """Their place may change; without `keep_best` they may be replaced, added and left out."""
    config = {"task": "sft", "data.eval_path": "a.json", "data.eval_root": "x", "train.keep_best": 2}
    stored = Meta(5, 40, 2, config, {"data.eval_path": "abc"})
    moved = config | {"data.eval_path": "b.json", "data.eval_root": "y"}
    check_resumable(stored, moved, {"data.eval_path": "abc"}, "w")
    for content in ({"data.eval_path": "xyz"}, {}):
        with pytest.raises(ResumeError, match="data.eval_path: the content is not the same"):
            check_resumable(stored, moved, content, "w")
        check_resumable(stored, moved | {"train.keep_best": 0}, content, "w")
    with pytest.raises(ResumeError, match="data.eval_path"):
        check_resumable(Meta(5, 40, 2, config, {}), moved, {"data.eval_path": "abc"}, "w")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with checkpoints of the steps 1, 3 and 5, and what was saved as step 5."""
    folder, state = tmp_path_factory.mktemp("three") / "c", make_state(make_mesh({"data": -1}))
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 3, 5):
            checkpoints.save(*state, dataclasses.replace(META, step=step), float(step))
    return folder, state


@pytest.fixture
def folder(three, tmp_path):
    return shutil.copytree(three[0], tmp_path / "c")


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("part", ["trainable", "opt", "meta", "metrics"])
@pytest.mark.parametrize("how", [flip, cut, os.unlink])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(folder, three, caplog, monkeypatch, part, how):
    """Its parameters used to be taken as they were."""
    monkeypatch.setattr(saved, "_SMALL", 64)  # of older ones larger files are not read; the arrays here are small
    how(largest(folder / "5" / part))
    take_up(folder)
    said = [record.message for record in caplog.records if record.name == saved.__name__]
    assert len(said) == 1 and "step 5" in said[0] and part in said[0] and "from step 3 instead" in said[0]
    assert (folder / "aside-5").is_dir() and saved.steps(folder) == [1, 3]
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 3 and checkpoints.meta(3).step == 3
        assert_same(checkpoints.restore(3, *three[1]), three[1])
        checkpoints.save(*three[1], META, 1.0)  # the place is free again
    assert saved.steps(folder) == [3, 5] and not saved.damage(folder / "5")


@pytest.mark.parametrize("name", ["digests.json", "_CHECKPOINT_METADATA", "commit_success.txt"])
def test_a_checkpoint_that_lost_what_says_that_it_is_whole_is_not(folder, name):
    (folder / "5" / name).unlink()
    take_up(folder)
    assert saved.steps(folder) == [1, 3]


def test_an_older_damaged_checkpoint_is_out_of_the_way(folder, caplog):
    """Orbax reads the metrics of all of them, and ended with a traceback."""
    (folder / "3" / "metrics" / "metrics").write_text("{")
    take_up(folder)
    assert saved.steps(folder) == [1, 5] and "going on" not in caplog.text
    with Checkpoints(folder, keep=3) as checkpoints:
        assert checkpoints.latest() == 5


def test_without_a_whole_checkpoint_nothing_begins_anew_by_itself(folder):
    for step in (1, 3, 5):
        flip(largest(folder / str(step) / "opt"))
    with pytest.raises(ResumeError, match=r"none of the checkpoints in .*\n  5: opt/.* changed bytes\n  3: .*\n  1: "):
        take_up(folder)
    assert saved.steps(folder) == [1, 3, 5]


def test_what_is_no_checkpoint_is_in_nobodys_way(folder, caplog):
    """An empty folder "999" counted as the newest step: no other was ever saved again, without a word."""
    for name in ("999", "998/x", "tmp", "²", "007", "7.orbax-checkpoint-tmp/x"):
        (folder / name).mkdir(parents=True)
    for name in ("77", "notes.txt"):
        (folder / name).write_text("mine")
    take_up(folder)
    kept = {p.name for p in folder.iterdir()}
    assert kept == {"1", "3", "5", "aside-999", "aside-998", "aside-77", "tmp", "²", "007", "notes.txt"}
    assert (folder / "aside-77").read_text() == "mine" and "999 is no checkpoint" in caplog.text
    with Checkpoints(folder, keep=3) as checkpoints:
        assert checkpoints.latest() == 5
    (folder / "999").mkdir()
    take_up(folder)
    assert (folder / "aside-999.2").is_dir()


def test_a_reader_refuses_damage_and_changes_nothing(folder, three):
    flip(largest(folder / "5" / "trainable"))
    flip(largest(folder / "3" / "opt"))  # of no concern for who wants the parameters
    before = sorted(folder.rglob("*"))
    with Checkpoints(folder, keep=1, read_only=True) as checkpoints:
        with pytest.raises(ResumeError, match=r"c/5 is damaged: trainable/.* changed bytes.*others there: 1, 3"):
            checkpoints.restore_trainable(5, three[1][0])
        assert_same(checkpoints.restore_trainable(3, three[1][0]), three[1][0])
    flip(folder / "1" / "meta" / "metadata")
    with pytest.raises(ResumeError, match="not a checkpoint of a run, or is damaged: meta/metadata"):
        checkpoints.meta(1)
    with pytest.raises(ResumeError, match="not a checkpoint of a run"):
        checkpoints.meta(2)
    assert sorted(folder.rglob("*")) == before


def test_another_optimiser_is_refused_by_name(folder, three):
    """Orbax's own error is pages long."""
    lora, _ = three[1]
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(
            ResumeError, match=r"the optimiser's state in .*c/5 do not fit the model: .*stored \[2, 8, 4\]"
        ):
            checkpoints.restore(5, lora, {"velocity": lora})


def test_a_checkpoint_of_another_version_says_what_it_lacks(folder):
    path = folder / "5" / "meta" / "metadata"
    stored = json.loads(path.read_text())
    for change, said in (
        ({"opt_shapes": 0}, "say opt_shapes"),
        ({"run": stored["run"] | {"new": 1}}, "differs in new"),
    ):
        path.write_text(json.dumps({k: v for k, v in (stored | change).items() if v != 0}))
        saved.digests.record(folder / "5", without=saved.WRITTEN_LATER)
        with Checkpoints(folder, keep=3) as checkpoints, pytest.raises(ResumeError, match=f"another version .*{said}"):
            checkpoints.meta(5)


def test_a_checkpoint_says_its_version_and_another_one_is_told_once(folder, three, caplog):
    path = folder / "5" / "meta" / "metadata"
    stored = json.loads(path.read_text())
    assert stored["version"] == __version__
    for version, said in ((__version__, []), ("0.0.9", ["0.0.9"]), (None, ["before 0.1.0"])):
        path.write_text(json.dumps({k: v for k, v in (stored | {"version": version}).items() if v is not None}))
        saved.digests.record(folder / "5", without=saved.WRITTEN_LATER)
        caplog.clear()
        with Checkpoints(folder, keep=3) as checkpoints:
            checkpoints.meta(5)
            checkpoints.restore(5, *three[1])
        told = [line for line in caplog.messages if "was written by mllm4d-jax" in line]
        assert len(told) == len(said) and all(word in line for word, line in zip(said, told, strict=True))


class Full:
    """The folder of a checkpoint's arrays cannot be written: what TensorStore says when the disk is full."""

    def __init__(self, monkeypatch):
        text = "RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']"
        record = saved.digests.record
        self.now = True

        def seal(*args, **kwargs):
            if self.now:
                raise ValueError(text)
            record(*args, **kwargs)

        monkeypatch.setattr(saved.digests, "record", seal)


@pytest.mark.parametrize("when", ["at the next step", "at the next checkpoint", "at the end"])
def test_a_full_disk_in_the_background_is_one_clear_error(tmp_path, monkeypatch, three, caplog, capfd, when):
    """In Orbax's threads, whose log is a traceback of a hundred lines; the run goes on from the checkpoint before."""
    state, folder = three[1], tmp_path / "c"
    full = Full(monkeypatch)
    full.now = False
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(*state, dataclasses.replace(META, step=1), 1.0)
    full.now = True
    message = r"checkpoint of step 3 cannot be saved: .*: No space left on device \(free.* Step 1 there is the newest"
    with pytest.raises(SaveError, match=message), Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(*state, dataclasses.replace(META, step=3), 1.0)
        if when == "at the next step":
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                checkpoints.check()
                time.sleep(0.01)
        elif when == "at the next checkpoint":
            checkpoints.save(*state, META, 1.0)
    assert "Traceback" not in capfd.readouterr().err and not [r for r in caplog.records if r.exc_info]
    assert [p.name for p in folder.iterdir()] == ["1"]  # what was written is gone: it fills the disk
    full.now = False
    take_up(folder)
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        assert_same(checkpoints.restore(1, *state), state)
        checkpoints.save(*state, dataclasses.replace(META, step=3), 1.0)
    assert saved.steps(folder) == [1, 3] and not saved.damage(folder / "3")


def test_another_error_keeps_its_kind_and_the_first_error_its_place(tmp_path, monkeypatch, three, caplog):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(saved.digests, "record", broken)
        with pytest.raises(ZeroDivisionError, match="a bug"), Checkpoints(tmp_path / "a", keep=2) as checkpoints:
            checkpoints.save(*three[1], META, 1.0)
    Full(monkeypatch)
    with pytest.raises(KeyError, match="the run's own"), Checkpoints(tmp_path / "b", keep=2) as checkpoints:
        checkpoints.save(*three[1], META, 1.0)
        raise KeyError("the run's own")
    assert "checkpoint of step 5 cannot be saved" in caplog.text


def test_nothing_is_written_where_another_run_has_taken_over(tmp_path, three):
    def guard():
        raise LockError("was taken over")

    with pytest.raises(LockError), Checkpoints(tmp_path / "c", keep=2, guard=guard) as checkpoints:
        checkpoints.save(*three[1], META, 1.0)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_place_where_no_folder_can_be_is_named(tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(ValueError, match="c: "):
        Checkpoints(tmp_path / "c", keep=1)
