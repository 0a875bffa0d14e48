"""Random access to the records of a JSON or JSONL file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm4d_jax.data.json_index import RecordFileError, build_index
from mllm4d_jax.files.cache import copied_file
from mllm4d_jax.files.remote import place
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import Record, parse_record


class RecordFile:
    """Random access to the records of one JSON or JSONL file.

    Attributes:
      path: the file; in a bucket, what is read is a copy of it (`files.cache`).
      root: folder that every media path must stay under.
      system_prompt: given to records that bring no system message of their own; '' for none.
      digest: sha256 of the file (hex), so that a resumed run can tell that its data changed.
      clips: i32 per record, equal for records that name the same media (see `JsonIndex`).
      unread: name of a field that nothing reads -> records that have it (see `JsonIndex`).
    """

    def __init__(self, path: str | Path, root: str | Path, system_prompt: str = "") -> None:
        """Indexes the file (one pass, nothing kept but offsets).

        Raises:
          RecordFileError: there is no such file, or it is neither a JSON list nor JSONL.
        """
        self.path, self.root, self.system_prompt = place(path), place(root), system_prompt
        try:
            copy = copied_file(path)
        except FileNotFoundError:
            raise RecordFileError(f"{path}: no such file of records (set data.path)") from None
        self._index = build_index(copy, name=str(path))
        self.digest, self.clips, self.unread = self._index.digest, self._index.clips, self._index.unread

    @property
    def name(self) -> str:
        """What messages call the whole file."""
        return str(self.path)

    def __len__(self) -> int:
        return len(self._index)

    def key(self, i: int) -> str:
        """The name of record i in every message about it: `file.json#i`, counted from 0, broken records included."""
        return f"{self.path.name}#{i}"

    def raw(self, i: int) -> dict[str, Any]:
        """Record i as the file has it.

        Raises:
          RecordError: reason "bad_json", naming line and column, or "bad_record" when it is not an object.
        """
        data = self._index.read(i)
        try:
            value = json.loads(data.decode("utf-8"))
        except json.JSONDecodeError as error:
            what = error.msg if data else "a comma or the closing bracket is missing here, or a comma is one too many"
            self._fail_json(i, len(error.doc[: error.pos].encode()), what)
        except UnicodeDecodeError as error:
            self._fail_json(i, error.start, f"not UTF-8: {error.reason}")
        except (ValueError, RecursionError) as error:
            self._fail_json(i, 0, str(error))
        if not isinstance(value, dict):
            raise RecordError(f"is a {type(value).__name__}, not an object with a conversation", key=self.key(i))
        return value

    def __getitem__(self, i: int) -> Record:
        """Record i, media paths resolved under the root.

        Raises:
          RecordError: as `raw` and `parse_record`.
        """
        return parse_record(self.raw(i), self.key(i), self.root, self.system_prompt)

    def _fail_json(self, i: int, offset: int, what: str) -> None:
        line, column = self._index.line_column(self._index.starts[i] + offset)
        raise RecordError(
            f"not valid JSON at line {line}, column {column} of {self.path}: {what}", "bad_json", self.key(i)
        )
