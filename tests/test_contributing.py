"""The walks of CONTRIBUTING.md: every file they name exists, and the way of a record stays as short as it says."""

from __future__ import annotations

import re

import pytest

from configs.reading import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FOLDERS = ("", "mllm4d_jax/", "data_prep/", "data_prep/sources/", "data_prep/stereo/")  # short names in the tables


def section(heading: str) -> str:
    (found,) = re.findall(rf"^### {heading}\n(.*?)^##", TEXT, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("heading", re.findall(r"^### (.*)", TEXT, re.MULTILINE))
def test_files_exist(heading):
    named = set(re.findall(r"`([\w/]+\.py)`", section(heading)))
    assert len(named) >= 8
    assert not [name for name in named if not any((ROOT / folder / name).is_file() for folder in FOLDERS)]


def test_the_way_of_a_record_is_as_short_as_it_says():
    way = section("How a record becomes a gradient")
    (said,) = re.findall(r"^(\d+) files", way, re.MULTILINE)
    table = "\n".join(line for line in way.splitlines() if line.startswith("|"))
    files = re.findall(r"`([\w/]+\.py)`", table)
    assert len(files) == len(set(files)) == int(said) <= 45
