"""Records of files that are tables: Parquet, as on the Hugging Face hub, and text with tabs between columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.files.cache import copied_file
from mllm4d_jax.files.remote import place
from mllm4d_jax.qa.errors import RecordError

TABLES = (".parquet", ".tsv")
_MOST_CELL = 1 << 24  # characters of a cell


class TableFile:
    """The rows of one table, all in memory, as objects of plain values.

    Attributes:
      path: the file; in a bucket, what is read is a copy of it.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file. Raises RecordFileError: there is none, or it is not of the form that its suffix says."""
        self.path = place(path)
        try:
            data = copied_file(path).read_bytes()
        except FileNotFoundError:
            raise RecordFileError(f"{path}: no such file of records (set data.path)") from None
        try:
            self._rows = _parquet(data) if self.path.suffix == ".parquet" else _tabbed(data)
        except (pyarrow.ArrowException, OSError, ValueError, csv.Error) as problem:
            raise RecordFileError(f"{path} cannot be read as a {self.path.suffix} file: {problem}") from None

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        """The name of row i in every message about it, counted from 0 and without a row of heads: `file.tsv#i`."""
        return f"{self.path.name}#{i}"

    def raw(self, i: int) -> Mapping[str, Any]:
        """Row i, column -> value. Raises RecordError for a row of a text table with more or fewer cells than heads."""
        row = self._rows[i]
        if None in row or None in row.values() and self.path.suffix == ".tsv":
            raise RecordError("has more or fewer cells than the table has heads", key=self.key(i))
        return row


def _parquet(data: bytes) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()


def _tabbed(data: bytes) -> list[dict[str, Any]]:
    """Rows of a table as pandas writes it: heads first, cells with tabs, line ends or quotes in them quoted."""
    before = csv.field_size_limit(_MOST_CELL)
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        return list(csv.DictReader(text, delimiter="\t", strict=True))
    finally:
        csv.field_size_limit(before)
