"""Replies of a teacher, kept by the content of the request: asked once, replayed for ever, also without a network."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.files.quoting import shown

REPLY_FORMAT = 1
MAX_REPLY_FILE_BYTES = 2**26
_KEY = re.compile(r"[0-9a-f]{64}")


class ReplayError(ValueError):
    """A stored reply is damaged."""


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

    def path(self, key: str) -> Path:
        """Return the file of a reply. Raises ReplayError for what is no sha256 in hexadecimal."""
        if not _KEY.fullmatch(key):
            raise ReplayError(f"{key!r} is not a request key (64 hexadecimal digits)")
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        """Return the stored reply, None if there is none. Raises ReplayError for a damaged file."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_REPLY_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        if len(data) > MAX_REPLY_FILE_BYTES:
            raise ReplayError(f"{path} has more than {MAX_REPLY_FILE_BYTES} bytes: no reply is that long")
        try:
            value = json.loads(data)
            if value["format"] != REPLY_FORMAT:
                raise ReplayError(f"{path} has format {shown(value['format'])}, this release reads {REPLY_FORMAT}")
            found, reply = value["key"], Reply(value["model"], value["content"], value["usage"])
            if not (isinstance(reply.content, str) and isinstance(reply.model, str) and isinstance(reply.usage, dict)):
                raise TypeError("a field has the wrong type")
        except ReplayError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ReplayError(f"{path} is damaged ({type(error).__name__}: {error}): delete it") from error
        if found != key:
            raise ReplayError(f"{path} holds the reply to another request ({shown(found)}): delete it")
        return reply

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply in one step; it replaces an older one."""
        path, value = self.path(key), {"format": REPLY_FORMAT, "key": key} | dataclasses.asdict(reply)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(value, sort_keys=True).encode() + b"\n")
