"""A run's folder in a bucket: one writer, and logs that are never behind a checkpoint."""

from __future__ import annotations

import json
import threading
import time

import jax.numpy as jnp
import pytest

from mllm4d_jax.files import remote
from mllm4d_jax.files.bucket_lock import BucketLock
from mllm4d_jax.files.lock import LockError
from mllm4d_jax.files.mirror import Mirror
from mllm4d_jax.run import saved
from mllm4d_jax.run.checkpoint import Checkpoints, SaveError
from mllm4d_jax.run.workdir import hold_workdir
from tests.buckets import BUCKET

ROOT = f"gs://{BUCKET}/runs"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lock(name: str, machine: str = "a", beat_s: float = 0.1, stale_s: float = 0.6) -> BucketLock:
    return BucketLock(f"{ROOT}/{name}", machine, beat_s=beat_s, stale_s=stale_s)


def test_two_runs_in_one_are_refused(front):
    with (
        lock("two", stale_s=60) as held,
        pytest.raises(LockError, match=f"another run is writing to {ROOT}/two: process"),
    ):
        with lock("two", "b", stale_s=60):
            pass
        held.check()
    with lock("two", "b", stale_s=60):
        pass


def test_a_writer_that_is_gone_is_replaced(front, capsys):
    dead = lock("dead")
    dead._take()  # and never beats
    began = time.monotonic()
    with lock("dead", "b") as held:
        assert time.monotonic() - began > 0.15
        with pytest.raises(LockError, match="was taken over by process"):
            dead.check()
        dead._generation = "1"
        assert not dead._write(), "who was taken over writes nothing more"
        held.check()
    dead._generation = "0"
    dead._take()
    capsys.readouterr()
    with lock("dead", "a"):  # of the same machine, which knows
        assert not capsys.readouterr().err, "a sign of it was waited for"


def test_who_leaves_does_not_delete_the_lock_of_who_takes_over_at_that_moment(front, monkeypatch):
    leaving, other = lock("leaving"), lock("leaving", "b")
    leaving._take()
    read, leaving._thread = leaving._read, threading.Thread(target=lambda: None)
    leaving._thread.start()

    def overtaken():
        found = read()
        other._generation = found[1]
        assert other._write()
        return found

    monkeypatch.setattr(leaving, "_read", overtaken)
    leaving.__exit__()
    other.check()


def test_of_many_who_come_at_once_one_writes(front):
    holding, most, refused = [], [], []

    def come(n: int) -> None:
        try:
            with lock("many", str(n), stale_s=60):
                holding.append(n)
                most.append(len(holding))
                time.sleep(0.5)
                holding.remove(n)
        except LockError:
            refused.append(n)

    threads = [threading.Thread(target=come, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(refused) + len(most) == 5


def test_an_answer_that_was_lost_is_no_other_writer(front):
    front.rate, front.kinds = 0.4, ("cut",)
    with lock("lost") as held:
        time.sleep(0.5)
        front.rate = 0.0
        held.check()


def test_a_look_at_the_lock_while_it_is_renewed_is_no_other_writer(front, monkeypatch):
    """Versions of it differ in length."""
    with lock("renewed", beat_s=0.01, stale_s=60) as held:
        info = remote.info

        def slow(path):
            about = info(path)
            held._owner["note"] = held._owner.get("note", "") + "longer"
            time.sleep(0.1)
            return about

        monkeypatch.setattr(remote, "info", slow)
        for _ in range(3):
            held.check()


def test_a_lock_that_was_deleted_by_hand_is_made_again(front):
    with lock("deleted", beat_s=0.3, stale_s=60) as held:
        remote.remove(f"{ROOT}/deleted/lock.json")
        held.check()
        with pytest.raises(LockError, match="another run is writing"), lock("deleted", "b", beat_s=0.3, stale_s=60):
            pass


def test_logs_are_uploaded_at_a_period_at_a_checkpoint_and_at_the_end(front, tmp_path):
    there = f"{ROOT}/logs"
    remote.upload(f"{there}/metrics.jsonl", b"1\n")
    remote.upload(f"{there}/checkpoints/1/x", b"x")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "left over").write_text("of a run that was killed before it was uploaded")
    read = lambda name: remote.place(f"{there}/{name}").read_bytes()  # noqa: E731
    with Mirror(there, tmp_path / "copy", period_s=0.2) as mirror:
        assert {p.name for p in mirror.folder.iterdir()} == {"metrics.jsonl"}
        with (mirror.folder / "metrics.jsonl").open("ab") as file:
            file.write(b"2\n")
        time.sleep(1.0)
        assert read("metrics.jsonl") == b"1\n2\n"
        (mirror.folder / "tb").mkdir()
        (mirror.folder / "tb" / "events").write_bytes(b"e")
        mirror.push()
        assert read("tb/events") == b"e"
        front.reset()
        mirror.push()
        assert not front.requests
        (mirror.folder / "tb" / "events").unlink()
        (mirror.folder / "end").write_bytes(b"e")
    assert remote.found(there).keys() == {"metrics.jsonl", "checkpoints/1/x", "end"}


@pytest.mark.parametrize(("status", "said"), [(403, "permission denied"), (401, "no credentials")])
def test_a_bucket_that_cannot_be_written_is_refused_before_any_work(front, status, said):
    front.refuse = lambda method, name: status if method == "POST" else None
    with pytest.raises(remote.RemoteError, match=said), hold_workdir(f"{ROOT}/read-only"):
        raise AssertionError
    with pytest.raises(remote.RemoteError, match="there is no bucket gs://none-such"), hold_workdir("gs://none-such/a"):
        raise AssertionError


def test_the_folder_is_held_uploaded_and_left(front):
    with hold_workdir(f"{ROOT}/held") as held:
        (held.path / "config.json").write_text(json.dumps({}))
        held.check()
        assert remote.found(f"{ROOT}/held").keys() == {"config.json", "lock.json"}
        assert str(held.home) == f"{ROOT}/held"
        with pytest.raises(LockError), hold_workdir(f"{ROOT}/held"):
            pass
    assert remote.found(f"{ROOT}/held").keys() == {"config.json"}


def test_who_was_taken_over_uploads_nothing_more(front):
    there = f"{ROOT}/taken"
    with pytest.raises(LockError, match="was taken over"), hold_workdir(there) as held:
        (held.path / "a").write_bytes(b"1")
        held.check()
        remote.upload(
            f"{there}/lock.json", json.dumps(held.lock._owner | {"id": "other", "time": time.time()}).encode()
        )
        remote.upload(f"{there}/a", b"of the other one")
        (held.path / "a").write_bytes(b"2")
    assert remote.place(f"{there}/a").read_bytes() == b"of the other one"


def test_processes_see_what_the_others_have_written(front, tmp_path):
    there = f"{ROOT}/several"
    remote.upload(f"{there}/b.1.jsonl", b"old\n")
    with Mirror(there, tmp_path / "0") as first, Mirror(there, tmp_path / "1") as second:
        (second.folder / "b.1.jsonl").write_bytes(b"old\nnew\n")
        (second.folder / "c.1.jsonl").write_bytes(b"c\n")
        (first.folder / "b.jsonl").write_bytes(b"mine\n")
        second.push()
        first.pull()
        assert (first.folder / "b.1.jsonl").read_bytes() == b"old\nnew\n"
        assert (first.folder / "c.1.jsonl").exists() and (first.folder / "b.jsonl").read_bytes() == b"mine\n"
        front.reset()
        first.pull()
        assert sum(front.requests.values()) == 1, "what is here already is fetched again"


def test_a_checkpoint_that_cannot_be_written_says_why(front):
    front.refuse = lambda method, name: 403 if method == "POST" and "/trainable" in name else None
    with pytest.raises(SaveError, match=r"step 3 cannot be saved: .*permission denied \(403\)"):
        with Checkpoints(f"{ROOT}/refused/checkpoints", keep=1) as kept:
            kept.save_trainable(3, {"a": jnp.ones(4)})
    front.reset()
    assert saved.steps(remote.place(f"{ROOT}/refused/checkpoints")) == []
