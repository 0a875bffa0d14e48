"""Folders that a program makes for itself: kept while they are what was asked for, made anew otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mllm4d_jax.files.atomic import new_folder

_MARKER = "complete.json"


class FolderError(ValueError):
    """A folder to be made has files in it that this program did not write."""


def make_folder(folder: Path, spec: Mapping[str, Any], write: Callable[[Path], None]) -> bool:
    """Make a folder all at once: written beside its place, then renamed into it with a list of its files.

    A folder that this function made is kept when it was made from the same `spec` and each of its files is there at its
    size, and is made anew otherwise. Files that others put beside them stay, or are in the way.

    Args:
      folder: its final place.
      spec: JSON-able description of the content.
      write: fills an empty folder.

    Returns:
      True when it was written, False when an existing one was kept.

    Raises:
      FolderError: something else is in the way.
    """
    made, found = _listing(folder / _MARKER), _sizes(folder)
    if made["spec"] == dict(spec) and made["files"].items() <= found.items():
        return False
    foreign = sorted(found.keys() - made["files"].keys())
    if foreign:
        raise FolderError(
            f"{folder} is in the way: it holds files that were not written by this program ({foreign[0]})"
        )
    if folder.exists():
        shutil.rmtree(folder)
    with new_folder(folder) as staging:
        write(staging)
        listing = {"spec": dict(spec), "files": _sizes(staging)}
        (staging / _MARKER).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    return True


def _listing(marker: Path) -> dict[str, Any]:
    """Return what a folder was made from and its files' sizes; nothing of both where that does not stand there."""
    try:
        stored = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        stored = None
    known = isinstance(stored, dict) and isinstance(stored.get("files"), dict) and "spec" in stored
    return stored if known else {"spec": None, "files": {}}


def _sizes(folder: Path) -> dict[str, int]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f != folder / _MARKER)
    return {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}
