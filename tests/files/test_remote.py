"""Objects of a bucket against the emulator: what is read is what was written, also where requests go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm4d_jax.files import digests, remote
from mllm4d_jax.files.atomic import PARTIAL, new_folder, unfinished
from mllm4d_jax.files.cache import copied_file, copied_folder
from mllm4d_jax.files.mirror import copied_logs
from mllm4d_jax.run.checkpoint import folder_digest
from mllm4d_jax.run.preflight import place_problems
from tests.buckets import BUCKET

ROOT = f"gs://{BUCKET}"
DATA = os.urandom(3 << 20)


@pytest.mark.parametrize(
    ("path", "said"), [("/a/b", False), ("a://b", False), ("gs://b/c", True), ("s3://b/c", True), ("gs:/b", False)]
)
def test_what_is_remote(path, said):
    assert remote.is_remote(path) is said


def test_other_places_are_refused():
    with pytest.raises(remote.RemoteError, match="only gs://BUCKET"):
        remote.place("s3://b/c")


def test_place_has_the_methods_of_a_path(front):
    folder = remote.place(f"{ROOT}/place") / "below"
    (folder / "a é%2F.txt").write_text("hé")
    assert (folder / "a é%2F.txt").read_bytes() == "hé".encode()
    assert [p.name for p in folder.iterdir()] == ["a é%2F.txt"] and folder.is_dir() and not folder.is_file()
    assert remote.found(f"{ROOT}/place").keys() == {"below/a é%2F.txt"}
    assert not (folder / "b").exists()


@pytest.mark.parametrize(("said", "error"), [(None, ""), ("0", ""), ("true", "set EPATH_USE_TF=false, or unset it")])
def test_paths_do_not_go_through_tensorflow(front, tmp_path, said, error):
    """Nor where it is installed, and etils was at work before: Orbax looks at a folder of the disk first."""
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('tensorflow is not to be imported')")
    code = (
        "import sys; from etils import epath; epath.Path('/').is_dir()\n"
        "from mllm4d_jax.files import remote\n"
        "remote.place(sys.argv[1]).write_text('a'); print(epath.Path(sys.argv[1]).read_text(), end='')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "EPATH_USE_TF"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    environment |= {} if said is None else {"EPATH_USE_TF": said}
    command = [sys.executable, "-c", code, f"{ROOT}/without_tensorflow"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert error in done.stderr and done.stdout == ("" if error else "a"), done.stderr


def test_transfers_survive_a_bad_service(front, tmp_path):
    front.rate = 0.3
    for n in range(4):
        remote.upload(f"{ROOT}/many/{n}", DATA + bytes([n]))
        remote.fetch(f"{ROOT}/many/{n}", tmp_path / str(n))
        assert (tmp_path / str(n)).read_bytes() == DATA + bytes([n])
        assert remote.read_range(f"{ROOT}/many/{n}", len(DATA) - 5, len(DATA) + 1) == DATA[-5:] + bytes([n])
    (tmp_path / "big").write_bytes(DATA * 4)
    remote.upload(f"{ROOT}/many/file", tmp_path / "big")
    remote.fetch(f"{ROOT}/many/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == DATA * 4
    assert front.hit


def test_only_one_creates_and_replaces(front):
    path = f"{ROOT}/lock"
    first = remote.write_if(path, b"one", "0")
    assert first and remote.write_if(path, b"two", "0") is None
    second = remote.write_if(path, b"three", first)
    assert second and remote.write_if(path, b"four", first) is None
    assert remote.place(path).read_bytes() == b"three"
    remote.remove(path)
    remote.remove(path)
    assert not remote.place(path).exists()


def test_missing_things_have_names(front):
    remote.require(f"{ROOT}/nothing/there/yet")
    with pytest.raises(remote.RemoteError, match="gs://no-such-bucket/a: there is no bucket gs://no-such-bucket"):
        remote.require("gs://no-such-bucket/a")
    with pytest.raises(FileNotFoundError):
        remote.read_range(f"{ROOT}/nothing", 0, 5)


def test_marks_of_folders_are_no_files(front, tmp_path, monkeypatch):
    """A console's "Create folder", or a mounted bucket, makes an empty object "sets/"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there = f"{ROOT}/marked/sets"
    for name in ("a.json", "sub/b"):
        remote.upload(f"{there}/{name}", name.encode())
    without = folder_digest(there)
    front.marks = ("marked/", "marked/sets/", "marked/sets/sub/", "marked/sets/empty/")
    assert remote.found(there).keys() == remote.found(f"{there}/").keys() == {"a.json", "sub/b"}
    assert not remote.is_file(f"{there}/") and remote.is_folder(f"{there}/") and remote.is_file(f"{there}/a.json")
    assert folder_digest(there) == without
    for copy in (copied_folder(there), copied_logs(there)):
        assert sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()) == ["a.json", "sub/b"]
    digests.record(there)
    assert remote.found(there).keys() == {"a.json", "sub/b", digests.LIST} and digests.damage(there) == ""
    assert json.loads(remote.place(f"{there}/{digests.LIST}").read_text())["files"].keys() == {"a.json", "sub/b"}


@pytest.mark.parametrize("path", [ROOT, f"{ROOT}/", "gs://", f"{ROOT}/folder/"])
def test_a_bucket_or_a_folder_is_no_file(front, tmp_path, path):
    assert not remote.is_file(path)
    for call in (remote.info, remote.size, lambda p: remote.fetch(p, tmp_path / "a"), copied_file):
        with pytest.raises(FileNotFoundError, match="and no file"):
            call(path)
    remote.remove(path)  # as of any file that is not there
    assert list(place_problems("data.path =", path, ROOT)) == [
        f"data.path = {path} is not a file of records, nor the folder of a TFDS set"
    ]


@pytest.mark.parametrize(("status", "said"), [(403, "permission denied"), (401, "no credentials")])
def test_refusals_say_what_to_do(front, tmp_path, status, said):
    front.refuse = lambda method, name: status
    for call in (
        lambda: remote.require(f"{ROOT}/a"),
        lambda: remote.fetch(f"{ROOT}/a", tmp_path / "a"),
        lambda: remote.upload(f"{ROOT}/a", b""),
        lambda: remote.write_if(f"{ROOT}/a", b"", "0"),
    ):
        with pytest.raises(remote.RemoteError, match=f"gs://{BUCKET}/a: {said}"):
            call()


def test_a_damaged_object_is_told_from_a_bad_network(front, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_TRIES", 2)
    remote.upload(f"{ROOT}/damaged", DATA)
    front.rate, front.kinds = 1.0, ("short",)
    with pytest.raises(remote.TransferError, match="gs://trial-bucket/damaged: what was read is not"):
        remote.fetch(f"{ROOT}/damaged", tmp_path / "a")


def test_a_folder_whose_upload_was_cut_off_is_made_anew(front):
    there = f"gs://{BUCKET}/folders/cut"
    for name in (PARTIAL, "model.safetensors"):
        remote.upload(f"{there}/{name}", b"x")
    assert unfinished(there)
    with new_folder(there) as folder:
        (folder / "config.json").write_bytes(b"{}")
    assert remote.found(there).keys() == {"config.json"} and not unfinished(there)
