"""Files of a recorded reference, as they are read: what is damaged or lacking is an error that names file and key."""

from __future__ import annotations

import json
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm4d_jax.files.quoting import plain, shown

_AGAIN = "record it again"
_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class RecordingError(ValueError):
    """A recorded reference is damaged, incomplete or inconsistent with its model."""


class Recorded(dict):
    """Values of a recorded file by their keys; a key that is not there raises RecordingError.

    Attributes:
      where: the file.
    """

    def __init__(self, values: Mapping[str, Any], where: pathlib.Path) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise RecordingError(f"{self.where}: {key} is missing: {_AGAIN}")


def read_npz(path: pathlib.Path) -> Recorded:
    """Return the arrays of an npz by name. Raises RecordingError for a file that is damaged, missing or no such one."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            return Recorded({name: loaded[name] for name in loaded.files}, path)
    except _DAMAGE as problem:
        said = plain(f"{type(problem).__name__}: {problem}")
        raise RecordingError(f"{path} cannot be read as an npz of plain arrays ({said}): {_AGAIN}") from problem


def read_json(path: pathlib.Path, kind: type[dict] | type[list] = dict) -> Any:
    """Return what a JSON file holds, with `Recorded` for every object in it.

    Args:
      kind: what it has to be.

    Raises:
      RecordingError: it is something else, damaged or missing.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda found: Recorded(found, path))
    except (OSError, ValueError, RecursionError) as problem:
        raise RecordingError(f"{path} cannot be read as JSON ({plain(problem)}): {_AGAIN}") from problem
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise RecordingError(f"{path} does not hold {wanted} of JSON, but {shown(value)}: {_AGAIN}")
    return value
