"""Replies of a teacher, kept by the content of the request: asked once, replayed for ever, also without a network."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm4d_jax.files.atomic import write_atomic

REPLY_FORMAT = 1
MAX_REPLY_FILE_BYTES = 2**26
_KEY = re.compile(r"[0-9a-f]{64}")


class ReplayError(ValueError):
    """A stored reply is damaged, or one is needed that is not there."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
      model: as named in the request.
      content: the text of its message.
      usage: token counts as the endpoint gave them; they say what replaying saves.
    """

    model: str
    content: str
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)


class ReplyCache:
    """A folder with one file per reply, named by the sha256 of the request. Any number of threads and processes may
    use it at once."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ReplayError(f"{key!r} is not a request key (64 hexadecimal digits)")
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        """The stored reply, None if there is none. Raises ReplayError for a damaged file."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_REPLY_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        if len(data) > MAX_REPLY_FILE_BYTES:
            raise ReplayError(f"{path} has more than {MAX_REPLY_FILE_BYTES} bytes: no reply is that long")
        return _decode(data, key, str(path))

    def put(self, key: str, reply: Reply) -> None:
        """Stores a reply in one step; it replaces an older one."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _encode(key, reply))

    def keys(self) -> Iterator[str]:
        """Keys of all stored replies, sorted."""
        for path in sorted(self.folder.glob("??/*.json")):
            if _KEY.fullmatch(path.stem):
                yield path.stem

    def pack(self, path: str | Path) -> int:
        """Writes all replies into one JSONL file that can be published with a data set; returns how many."""
        lines = [_encode(key, reply) for key in self.keys() if (reply := self.get(key)) is not None]
        write_atomic(path, b"".join(lines))
        return len(lines)

    def unpack(self, path: str | Path) -> int:
        """Stores all replies of a packed file; returns how many. Raises ReplayError naming the line that is damaged."""
        count = 0
        with open(path, "rb") as file:
            while line := file.readline(MAX_REPLY_FILE_BYTES):
                count += 1
                key, reply = _decode_line(line, f"{path}, line {count}")
                self.put(key, reply)
        return count


def _encode(key: str, reply: Reply) -> bytes:
    value = {"format": REPLY_FORMAT, "key": key} | dataclasses.asdict(reply)
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _decode(data: bytes, key: str, where: str) -> Reply:
    found, reply = _decode_line(data, where)
    if found != key:
        raise ReplayError(f"{where} holds the reply to another request ({found}): delete it")
    return reply


def _decode_line(data: bytes, where: str) -> tuple[str, Reply]:
    try:
        value = json.loads(data)
        if value["format"] != REPLY_FORMAT:
            raise ReplayError(f"{where} has format {value['format']!r}, this release reads {REPLY_FORMAT}")
        key, reply = value["key"], Reply(value["model"], value["content"], value["usage"])
        if not (isinstance(reply.content, str) and isinstance(reply.model, str) and isinstance(reply.usage, dict)):
            raise TypeError("a field has the wrong type")
    except ReplayError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ReplayError(f"{where} is damaged ({type(error).__name__}: {error}): delete it") from error
    return key, reply
