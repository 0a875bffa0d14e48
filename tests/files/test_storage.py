"""Errors of the disk name the file and what to do, whoever reports them; whole rows stay whole."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mllm4d_jax.files import atomic, jsonl, storage
from mllm4d_jax.files.storage import StorageError, of_disk, storing

ROOT = Path(__file__).parents[2]


def test_a_full_disk_is_named_with_the_file():
    with pytest.raises(StorageError, match=r"^/dev/full: No space left on device \(free some space there\)$"):
        jsonl.append("/dev/full", [{"step": 1}])
    with pytest.raises(StorageError, match="No space left"), storing("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")


def test_other_errors_and_their_kinds_are_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError), storing(tmp_path):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(StorageError) as caught, storing("out"):
        open(tmp_path)
    assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
    assert caught.value.errno == errno.EISDIR and str(tmp_path) in str(caught.value)


def test_what_a_library_wraps_is_found():
    text = "RESOURCE_EXHAUSTED: Error writing \"a\": No space left on device [os_error_code='28'] [x='y']"
    try:
        try:
            raise ValueError(text)
        except ValueError as inner:
            raise RuntimeError("wrapped") from inner
    except RuntimeError as error:
        assert str(of_disk(error, "ckpt/4")).startswith("ckpt/4: No space left on device (free")
    assert of_disk(RuntimeError("I/O error: No space left on device (os error 28)"), "a").errno == errno.ENOSPC
    try:
        try:
            open(ROOT, "w")
        except OSError:
            raise KeyError("a bug in handling it")  # noqa: B904
    except KeyError as error:
        assert of_disk(error, "x") is None  # keeps its traceback
    assert of_disk(ValueError("shapes differ"), "x") is None and of_disk(None, "x") is None
    assert of_disk(OSError(errno.ENOENT, "gone"), "x") is None


LIMITED = """
import resource, signal, sys
from mllm4d_jax.files import atomic, jsonl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (lambda: jsonl.append("rows.jsonl", [{"step": 3, "text": "x" * 2000}]),
              lambda: atomic.write_json("a.json", "y" * 2000)):
    try:
        write()
    except ValueError as problem:
        print(problem)
"""


def test_half_a_row_is_taken_back_and_the_old_file_stays(tmp_path):
    """A real limit on the size of files: the write is cut short by the system, as on a disk that fills up."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
    jsonl.append(tmp_path / "rows.jsonl", [{"step": 1}, {"step": 2}])
    atomic.write_json(tmp_path / "a.json", "old")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", LIMITED], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.stdout.splitlines() == [
        f"{name}: File too large ({storage.REMEDIES[errno.EFBIG]})" for name in ("rows.jsonl", "a.json")
    ], found.stderr
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "a.json").read_text() == '"old"\n' and len(list(tmp_path.iterdir())) == 2


def test_two_writers_of_one_folder_do_not_clear_each_other(tmp_path):
    with atomic.new_folder(tmp_path / "out") as first:
        (first / "a").write_text("1")
        with pytest.raises(ValueError, match="another run is writing to .*out"):
            with atomic.new_folder(tmp_path / "out"):
                pass
        assert (first / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
