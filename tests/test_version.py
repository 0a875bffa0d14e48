"""The version: one number in one place, told by what is written."""

from __future__ import annotations

import tomllib

import pytest

import run
from configs.reading import ROOT
from mllm4d_jax import __version__
from mllm4d_jax.files.version import of_another
from mllm4d_jax.report.page import Markup, Section, page


def test_it_is_said_by_the_program_and_on_every_page(capsys):
    assert run.main(["run.py", "--version"]) == 0
    assert capsys.readouterr().out == f"mllm4d-jax {__version__}\n"
    assert f"Made by mllm4d-jax {__version__}." in page("t", [Section("a", "A", Markup(""))])


def test_it_stands_in_one_place():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in about["project"] and about["project"]["dynamic"] == ["version"]
    assert about["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mllm4d_jax.__version__"}
    files = [p for top in ("mllm4d_jax", "configs", "data_prep", "tools") for p in (ROOT / top).rglob("*.py")]
    assert [p.name for p in files if f'"{__version__}"' in p.read_text(encoding="utf-8")] == ["__init__.py"]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (__version__, ""),
        ("0.0.9", f"f was written by mllm4d-jax 0.0.9; this is {__version__}"),
        ("", f"f was written by mllm4d-jax before 0.1.0; this is {__version__}"),
        (None, f"f was written by mllm4d-jax before 0.1.0; this is {__version__}"),
        ("\x1b[31m", f"f was written by mllm4d-jax '\\x1b[31m'; this is {__version__}"),
    ],
)
def test_files_of_another_version_are_told_in_a_line(version, said):
    assert of_another("f", version) == said
