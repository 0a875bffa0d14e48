"""JSON Lines files that a run appends to: one JSON object a line, whole lines only.

A writer may be killed at any byte, which leaves a last line without its line break. Such a line counts if it holds a
whole object, and is cut off when the file is taken up again. Nothing else is ever dropped: any other line that holds
no object is an error that names the file and the line.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mllm4d_jax.files.storage import storing

Row = dict[str, Any]

_BLOCK = 1 << 16  # bytes read at a time from the end of a file
_NO_OBJECT, _NO_STEP = "not a JSON object", "has no whole number 'step'"
_REMEDY = "A killed run damages no line but the last, so the file was changed: correct this line or delete it"


class JsonLinesError(ValueError):
    """A line of a file is not what a run writes there."""


class Line(NamedTuple):
    """A line of a file that is not blank.

    Attributes:
      number: from 1.
      start: offset of its first byte.
      row: the JSON object on it; None where there is none.
      ended: it has a line break, so that its writer was done with it.
    """

    number: int
    start: int
    row: Row | None
    ended: bool


def append(path: str | Path, rows: Iterable[Row]) -> None:
    """Append rows to a file, made if need be; once this returns, the end of the process cannot lose them.

    A file that a killed run may have left has to be taken up with `rewind` first.

    Raises:
      StorageError: the disk is full, read-only or the like; what was written of these rows is cut off again.
    """
    data = encoded(rows)
    with storing(path), open(path, "ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise


def encoded(rows: Iterable[Row]) -> bytes:
    """Return rows as lines of a file.

    Everything but ASCII is escaped, so that no reader finds a line break inside a row.
    """
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode("ascii")


def scan(path: str | Path) -> Iterator[Line]:
    """Yield the lines of a file, damaged ones too; none for a file that is not there."""
    if not Path(path).is_file():
        return
    start = 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield Line(number, start, _object(text), text.endswith(b"\n"))
            start += len(text)


def read(path: str | Path) -> Iterator[Line]:
    """Yield the lines of a file, all with a row; a half-written last one is left out.

    Raises:
      JsonLinesError: another line is damaged.
    """
    for line in scan(path):
        if line.row is not None:
            yield line
        elif line.ended:
            raise _damaged(path, line.number, _NO_OBJECT)


def read_steps(
    path: str | Path, up_to: int | None = None, numbers: Sequence[str] = (), measured: Sequence[str] = ()
) -> list[Row]:
    """Return the rows of a file whose rows have a "step", those after step `up_to` left out.

    Args:
      numbers: fields that each of them has to have, as numbers.
      measured: likewise, null where it was not measured.

    Raises:
      JsonLinesError: a line is damaged.
    """
    found = []
    for line in read(path):
        if up_to is not None and not _has_step(line.row):
            raise _damaged(path, line.number, _NO_STEP)
        if up_to is not None and line.row["step"] > up_to:
            continue
        for name in (*numbers, *measured):
            null = name in measured and name in line.row and line.row[name] is None
            if not null and not _is_number(line.row.get(name)):
                raise _damaged(path, line.number, f"has no number '{name}'")
        found.append(line.row)
    return found


def rewind(path: str | Path, step: int | None = None) -> None:
    """Cut off, in place, a half-written last line and the rows after `step` (None: no row).

    Rows have to be in the order of their steps. The file is read from its end and no farther than to the row that
    stays the last one, so that its size does not matter.

    Raises:
      JsonLinesError: a line that was read is damaged; nothing is cut then.
      StorageError: the file cannot be written.
    """
    if not Path(path).is_file():
        return
    with storing(path), open(path, "r+b") as file:
        for start, text in _backwards(file):
            row = _object(text)
            if row is None and not (text.strip() and text.endswith(b"\n")):
                continue
            if row is None or (step is not None and not _has_step(row)):
                raise _damaged(path, _number(file, start), _NO_OBJECT if row is None else _NO_STEP)
            if step is None or row["step"] <= step:
                file.truncate(start + len(text))
                if not text.endswith(b"\n"):
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                return
        file.truncate(0)


def of_host(path: str | Path, host: int) -> Path:
    """Return the file of one host of a run: `path` for the first one (0), else NAME.HOST.jsonl beside it."""
    path = Path(path)
    return path.with_name(f"{path.stem}.{host}{path.suffix}") if host else path


def of_all_hosts(path: str | Path) -> list[Path]:
    """Return the files that the hosts of a run have written, as `of_host` names them, by host."""
    path, found = Path(path), {}
    for file in path.parent.glob(f"{path.stem}.*{path.suffix}"):
        host = file.stem.removeprefix(f"{path.stem}.")
        if host.isdecimal():
            found[int(host)] = file
    return [file for file in (path, *(found[host] for host in sorted(found))) if os.path.isfile(file)]


def _object(text: bytes) -> Row | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, text with its line break) of every line, the last one first; holds a block and a line."""
    position, held = file.seek(0, os.SEEK_END), b""
    while position:
        size = min(_BLOCK, position)
        position -= size
        file.seek(position)
        held = file.read(size) + held
        while (cut := held.rfind(b"\n", 0, len(held) - 1)) >= 0:
            yield position + cut + 1, held[cut + 1 :]
            held = held[: cut + 1]
    if held:
        yield 0, held


def _number(file: BinaryIO, start: int) -> int:
    """Return the number of the line that starts at an offset."""
    file.seek(0)
    count = 1
    while start:
        block = file.read(min(_BLOCK, start))
        count, start = count + block.count(b"\n"), start - len(block)
    return count


def _has_step(row: Row) -> bool:
    return isinstance(row.get("step"), int) and not isinstance(row["step"], bool)


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _damaged(path: str | Path, number: int, what: str) -> JsonLinesError:
    return JsonLinesError(f"{path}, line {number}: {what}. {_REMEDY}")
