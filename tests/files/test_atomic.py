"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mllm4d_jax.files import atomic


class Killed(Exception):
    """Stands for whatever ends a writer."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"b": 1, "a": "é"})
    assert json.loads(path.read_text()) == {"a": "é", "b": 1} and path.read_text().endswith("}\n")
    with atomic.open_atomic(path) as file:
        file.write(b"new")
        file.flush()
        assert b"new" not in path.read_bytes() and len(names(tmp_path)) == 2
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.json"]
    with pytest.raises(Killed), atomic.open_atomic(path) as file:
        file.write(b"half")
        raise Killed
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.json"]


def test_what_is_written_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append((os.fstat(number).st_size, names(tmp_path))))
    atomic.write_atomic(tmp_path / "a", b"12345")
    ((size, there),) = done
    assert size == 5 and "a" not in there


def test_writers_that_go_by_the_ending_get_it(tmp_path):
    with atomic.replacing(tmp_path / "a.mp4", ".mp4") as partial:
        assert partial.suffix == ".mp4" and partial.parent == tmp_path
        partial.write_bytes(b"1")
    assert names(tmp_path) == ["a.mp4"]


def test_two_threads_may_write_one_file(tmp_path):
    def write(text: bytes) -> None:
        for _ in range(50):
            atomic.write_atomic(tmp_path / "a", text * 1000)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (b"x", b"y")))  # raises what a thread raised
    assert (tmp_path / "a").read_bytes() in (b"x" * 1000, b"y" * 1000) and names(tmp_path) == ["a"]


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(Killed), atomic.new_folder(path) as folder:
        (folder / "half").touch()
        raise Killed
    assert names(tmp_path) == []
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").touch()
    path.mkdir()  # empty: not in the way
    with atomic.new_folder(path) as folder:
        assert names(folder) == []
        (folder / "whole").touch()
    assert names(path) == ["whole"] and names(tmp_path) == ["out"]
    with pytest.raises(OSError), atomic.new_folder(path) as folder:
        (folder / "other").touch()
    assert names(path) == ["whole"] and names(tmp_path) == ["out"]


def test_what_killed_writers_left_is_removed_by_name(tmp_path):
    for name in ("a.json.1-2.partial", "a.mp4.1-2.partial.mp4", "b.json.1-2.partial", "a.json"):
        (tmp_path / name).touch()
    atomic.remove_partials(tmp_path, "a.*")
    assert names(tmp_path) == ["a.json", "b.json.1-2.partial"]
    atomic.remove_partials(tmp_path)
    assert names(tmp_path) == ["a.json"]
