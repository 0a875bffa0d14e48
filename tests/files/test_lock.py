"""One writer at a time: who lives is left alone, who is gone is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm4d_jax.files import lock
from mllm4d_jax.files.lock import LockError, WriterLock
from mllm4d_jax.files.storage import StorageError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from mllm4d_jax.files.lock import WriterLock
with WriterLock.of(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def quick(folder) -> WriterLock:
    return WriterLock(Path(folder) / lock.NAME, folder, beat_s=0.1, stale_s=0.6)


def of_another_machine(folder, age_s=0.0, **changes) -> Path:
    owner = {"host": "far", "machine": "other", "pid": 7, "id": "x", "time": time.time() - age_s} | changes
    (folder / lock.NAME).write_text(json.dumps(owner))
    return folder / lock.NAME


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    with WriterLock.of(tmp_path) as first:
        owner = json.loads((tmp_path / lock.NAME).read_text())
        assert owner["pid"] == os.getpid() and abs(owner["time"] - time.time()) < 60
        with pytest.raises(LockError, match=rf"another run is writing to {tmp_path}: process {os.getpid()} on .* ago"):
            WriterLock.of(tmp_path).__enter__()
        first.check()
    assert list(tmp_path.iterdir()) == []
    with WriterLock.of(tmp_path):
        pass


def test_a_killed_writer_leaves_nothing_to_clear_away(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LockError, match=f"process {other.pid} on"):
            WriterLock.of(tmp_path).__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == other.pid
    started = time.monotonic()
    with WriterLock.of(tmp_path):
        assert time.monotonic() - started < lock.BEAT_S


def test_another_machine_that_gives_a_sign_is_alive(tmp_path, monkeypatch):
    """However old its time looks: clocks differ."""
    path, looks = of_another_machine(tmp_path, age_s=1e6), []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            of_another_machine(tmp_path, age_s=1e6 - 15)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(LockError, match="process 7 on far"):
        quick(tmp_path).__enter__()
    assert len(looks) == 2 and json.loads(path.read_text())["pid"] == 7


@pytest.mark.parametrize(("age_s", "at_least"), [(0, 0.6), (-1e6, 0.6), (1e6, 0.1)])
def test_another_machine_that_is_silent_for_long_enough_is_gone(tmp_path, age_s, at_least, capsys):
    of_another_machine(tmp_path, age_s)
    started = time.monotonic()
    with quick(tmp_path) as mine:
        assert time.monotonic() - started >= at_least
        mine.check()
    assert "waiting for a sign of process 7 on far" in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"", b"{", b"\x00" * 512, b"null", b'{"pid": "7"}', b"\xff\xfe"])
def test_a_damaged_file_is_in_nobodys_way(tmp_path, text):
    (tmp_path / lock.NAME).write_bytes(text)
    with quick(tmp_path) as mine:
        mine.check()


def test_a_writer_that_was_taken_for_dead_ends(tmp_path):
    with WriterLock.of(tmp_path) as first:
        path = of_another_machine(tmp_path)
        with pytest.raises(LockError, match="was taken over by process 7 on far.*writes nothing more"):
            first.check()
    assert json.loads(path.read_text())["pid"] == 7  # not this one's to remove


@pytest.mark.parametrize("known", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_disk_knows_no_locks_the_time_decides(tmp_path, monkeypatch, known):
    def refuse(*_):
        raise OSError(known, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with quick(tmp_path) as first:
        with pytest.raises(LockError, match="another run is writing"):
            quick(tmp_path).__enter__()  # sees the time renewed
        first.check()
    kept = json.dumps(first._owner | {"time": time.time()})  # as a killed one leaves it
    (tmp_path / lock.NAME).write_text(kept)
    with quick(tmp_path):
        pass


def test_a_full_disk_does_not_make_a_writer_look_dead(tmp_path, monkeypatch):
    with quick(tmp_path) as mine:
        path = tmp_path / lock.NAME
        before, write = json.loads(path.read_text())["time"], os.pwrite
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(full))
        time.sleep(0.3)
        monkeypatch.setattr(os, "pwrite", write)
        deadline = time.monotonic() + 10
        while json.loads(path.read_text())["time"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mine.check()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "open", lambda path, *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system", str(path)))
    )
    with pytest.raises(StorageError, match=r"lock.json: Read-only file system \(give write permission"):
        WriterLock.of(tmp_path).__enter__()
