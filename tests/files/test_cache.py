"""Copies of objects on this machine: fetched once, bounded, and never thrown out while they are in use."""

from __future__ import annotations

import concurrent.futures
import pickle
import subprocess
import sys

import pytest

from mllm4d_jax.files import remote
from mllm4d_jax.files.cache import ClipCache, cache_folder, copied_file, copied_folder
from tests.buckets import BUCKET

ROOT = f"gs://{BUCKET}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def clip(name: str, size: int = 1000) -> str:
    remote.upload(f"{ROOT}/cache/{name}", name.encode().ljust(size))
    return f"{ROOT}/cache/{name}"


def kept() -> set[str]:
    return {file.name for file in cache_folder().glob("clips/*/*/*")}


def test_each_clip_is_fetched_once_by_many(front):
    path, cache = clip("é %2f.mp4"), ClipCache(1e9)
    front.reset()

    def read(_):
        with pickle.loads(pickle.dumps(cache)).held(path) as file:
            assert file.name == "é %2f.mp4"
            return file.read_bytes()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(24))) == {"é %2f.mp4".encode().ljust(1000)}
    asked = sum(n for name, n in front.requests.items())
    assert asked <= 3, front.requests  # what it is, and its bytes
    with cache.held(path):
        assert sum(front.requests.values()) == asked


def test_other_processes_share_them(front, tmp_path):
    path = clip("shared.mp4")
    code = (
        "import sys; from mllm4d_jax.files.cache import ClipCache\n"
        "with ClipCache(1e9).held(sys.argv[1]) as file: print(len(file.read_bytes()))"
    )
    front.reset()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        command = [sys.executable, "-c", code, path]
        assert set(pool.map(lambda _: subprocess.check_output(command, text=True).strip(), range(3))) == {"1000"}
    assert sum(front.requests.values()) <= 3, front.requests


def test_the_clip_not_used_for_longest_goes_first_and_none_in_use(front):
    cache = ClipCache(3500)
    with cache.held(clip("a")) as used:
        for name in "bcd":
            with cache.held(clip(name)):
                pass
        assert used.read_bytes().strip() == b"a"
        assert kept() == {"a", "c", "d"}
    with cache.held(f"{ROOT}/cache/c"), cache.held(clip("e")):
        pass
    assert kept() == {"c", "d", "e"}
    with cache.held(f"{ROOT}/cache/a") as again:
        assert again.read_bytes().strip() == b"a"


def test_a_failed_fetch_leaves_nothing(front, monkeypatch):
    monkeypatch.setattr(remote, "_TRIES", 1)
    path = clip("broken.mp4")
    with pytest.raises(FileNotFoundError), ClipCache(1e9).held(f"{ROOT}/cache/none.mp4"):
        pass
    front.rate, front.kinds = 1.0, ("short",)
    with pytest.raises(remote.TransferError), ClipCache(1e9).held(path):
        pass
    assert not kept()


def test_a_list_is_copied_once_for_each_version(front, tmp_path):
    path = f"{ROOT}/lists/records.json"
    remote.upload(path, b"[1]")
    assert copied_file(path).read_bytes() == b"[1]" and copied_file(path).name == "records.json"
    front.reset()
    copied_file(path)
    assert sum(front.requests.values()) == 1  # its version
    remote.upload(path, b"[2]")
    assert copied_file(path).read_bytes() == b"[2]"
    assert copied_file(tmp_path / "a") == tmp_path / "a"


def test_a_folder_is_copied_whole(front):
    for name in ("features.json", "below/data-0"):
        remote.upload(f"{ROOT}/sets/alone/1.0.0/{name}", name.encode())
    folder = copied_folder(f"{ROOT}/sets/alone/1.0.0")
    assert (folder.parent.name, folder.name) == ("alone", "1.0.0")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "features.json",
        "below/data-0",
    }
    assert copied_folder(f"{ROOT}/sets/alone/1.0.0") == folder


@pytest.mark.parametrize("letter", ["動", "é", "a", "\U0001f600"])
def test_names_longer_than_a_file_system_takes(letter, monkeypatch):
    """Buckets take names of 1024 bytes, file systems 255; suffixes tell what is in a file."""
    name = letter * (500 // len(letter.encode()))
    monkeypatch.setattr(remote, "fetch", lambda path, target: target.write_bytes(path.encode()))
    monkeypatch.setattr(remote, "info", lambda path: {"generation": 1})
    monkeypatch.setattr(remote, "found", lambda path: {"features.json": {"generation": 1}})
    path = f"gs://b/{name}/{name}.mp4"
    with ClipCache(1e9).held(path) as file:
        assert file.read_bytes() == path.encode() and file.suffix == ".mp4" and file.stem.strip(letter) == ""
        assert 100 < len(file.name.encode()) <= 120
    assert copied_file(path).read_bytes() == path.encode() and copied_file(path).suffix == ".mp4"
    folder = copied_folder(f"gs://b/{name}/{name}")
    assert (folder / "features.json").read_bytes() == f"gs://b/{name}/{name}/features.json".encode()
