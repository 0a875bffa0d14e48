"""Damage to any byte of a listed file is found; samples tell versions of large files apart."""

from __future__ import annotations

import hashlib

import pytest

from mllm4d_jax.files import digests

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "f" / "d").mkdir(parents=True)
    (tmp_path / "f" / "a.bin").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "f" / "d" / "b").write_bytes(b"x" * 3 * MIB)
    (tmp_path / "f" / "later").write_bytes(b"1")
    digests.record(tmp_path / "f", without=("later",))
    return tmp_path / "f"


def test_an_untouched_folder_has_no_damage(folder):
    (folder / "later").write_bytes(b"other")
    (folder / "new").touch()
    assert digests.damage(folder) == ""
    folder.rename(folder.with_name("moved"))
    assert digests.damage(folder.with_name("moved")) == ""


@pytest.mark.parametrize("at", [0, MIB + 7, 3 * MIB - 1])
def test_one_changed_byte_is_found_wherever_it_is(folder, at):
    with (folder / "d/b").open("r+b") as file:
        file.seek(at)
        file.write(b"y")
    assert digests.damage(folder) == "d/b has changed bytes"
    assert digests.damage(folder, largest=MIB) == ""


def test_files_that_are_cut_short_or_gone_are_named(folder):
    (folder / "a.bin").write_bytes(b"short")
    (folder / "d/b").unlink()
    assert digests.damage(folder, largest=0) == "a.bin has 5 bytes instead of 2,560; d/b is missing"


@pytest.mark.parametrize(
    "text", [None, b"", b"{}", b"null", b"\xff", b'{"files": {"a": 1}}', b'{"files": {"a": ["x", 1]}}']
)
def test_a_list_that_is_damaged_is_damage(folder, text):
    path = folder / digests.LIST
    path.unlink() if text is None else path.write_bytes(text)
    assert digests.damage(folder).startswith(f"{digests.LIST} ")


def test_a_sample_of_a_small_file_is_all_of_it(tmp_path):
    (tmp_path / "a").write_bytes(b"hello")
    assert digests.sampled(tmp_path / "a", MIB) == f"5:{hashlib.sha256(b'hello').hexdigest()}"


@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.77, 0.98])
def test_a_changed_stretch_in_the_middle_of_a_large_file_is_noticed(tmp_path, share):
    """The gap between two samples is size * 64 KiB / most: 1/16 of it here."""
    path, size = tmp_path / "a", 20 * MIB
    with path.open("wb") as file:
        file.truncate(size)
    before = digests.sampled(path, MIB)
    with path.open("r+b") as file:
        file.seek(int(share * size))
        file.write(b"\1" * min(size // 15, size - int(share * size)))
    after = digests.sampled(path, MIB)
    assert before != after and before.startswith(f"{size}:") and after.startswith(f"{size}:")
