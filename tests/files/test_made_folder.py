"""Folders that a program makes for itself: kept, made anew, and never at the cost of files of the user's own."""

from __future__ import annotations

import pytest

from mllm4d_jax.files.made_folder import FolderError, make_folder

SPEC = {"kind": "letters", "seed": 1}


def fill(folder):
    (folder / "more").mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "more/b.txt").write_text("b")


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.txt")}


def test_a_complete_folder_is_kept_and_another_or_damaged_one_made_anew(tmp_path):
    folder = tmp_path / "in/f"
    assert make_folder(folder, SPEC, fill)
    assert not make_folder(folder, SPEC, fill)
    assert make_folder(folder, SPEC | {"seed": 2}, lambda new: (new / "a.txt").write_text("new"))
    assert content(folder) == {"a.txt": "new"}
    assert make_folder(folder, SPEC, fill)
    (folder / "more/b.txt").unlink()
    assert make_folder(folder, SPEC, fill) and content(folder) == {"a.txt": "a", "more/b.txt": "b"}
    (folder / "a.txt").write_text("cut short")
    assert make_folder(folder, SPEC, fill) and content(folder) == {"a.txt": "a", "more/b.txt": "b"}


def test_an_interrupted_write_leaves_nothing_half_done(tmp_path):
    def fail(folder):
        fill(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_folder(tmp_path / "f", SPEC, fail)
    assert not (tmp_path / "f").exists()
    assert make_folder(tmp_path / "f", SPEC, fill)


def test_files_of_others_are_never_removed(tmp_path):
    folder = tmp_path / "f"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/thesis.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"f is in the way: .* \(deep/thesis.txt\)"):
        make_folder(folder, SPEC, fill)
    assert content(folder) == {"deep/thesis.txt": "mine"}


def test_a_file_put_into_a_made_folder_stays(tmp_path):
    make_folder(tmp_path / "f", SPEC, fill)
    (tmp_path / "f/more/notes.txt").write_text("mine")
    assert not make_folder(tmp_path / "f", SPEC, fill)
    with pytest.raises(FolderError, match="notes.txt"):
        make_folder(tmp_path / "f", SPEC | {"seed": 2}, fill)
    assert content(tmp_path / "f") == {"a.txt": "a", "more/b.txt": "b", "more/notes.txt": "mine"}


@pytest.mark.parametrize("text", ["", '{"spec": {', "[]", '{"spec": 1}', '{"spec": 1, "files": []}'])
def test_a_damaged_list_says_nothing_about_the_files(tmp_path, text):
    make_folder(tmp_path / "f", SPEC, fill)
    (tmp_path / "f/complete.json").write_text(text)
    with pytest.raises(FolderError, match="a.txt"):
        make_folder(tmp_path / "f", SPEC, fill)
    assert content(tmp_path / "f") == {"a.txt": "a", "more/b.txt": "b"}
