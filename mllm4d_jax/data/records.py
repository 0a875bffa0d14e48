"""The released record formats, read into `Record`.

Two layouts are accepted, in a JSON list or as JSONL:

- conversations (MLLM4D-2M, cold start): `{"video": str | [str], "image": ..., "conversations": [{"from", "value"}]}`;
- messages (MLLM4D-R1-30k): `{"messages": [{"role", "content"}], "videos": [str], "images": [str], "solution": ...}`.

`<video>` and `<image>` in user text stand for the files, in order. Text around them is stripped of white space at
both ends and blank pieces are dropped, as in the loader the released checkpoints were trained with; system and
assistant text is kept to the letter. That loader took every role besides "user" and "system" for the assistant,
"human" included; here "human" is the user, "gpt" is the assistant and any other role is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm4d_jax.data.json_index import build_index
from mllm4d_jax.processing.errors import PlaceholderError, RecordError
from mllm4d_jax.processing.example import Record
from mllm4d_jax.processing.media_path import resolve_media

ROLES = {"user": "user", "human": "user", "system": "system", "assistant": "assistant", "gpt": "assistant"}
_PLACEHOLDER = re.compile("(<video>|<image>)")


class RecordFile:
    """Random access to the records of one JSON or JSONL file.

    Attributes:
      path: the file.
      root: folder that every media path must stay under.
      system_prompt: given to records that bring no system message of their own; '' for none.
      digest: sha256 of the file (hex), so that a resumed run can tell that its data changed.
      clips: i32 per record, equal for records that name the same media (see `JsonIndex`).
    """

    def __init__(self, path: str | Path, root: str | Path, system_prompt: str = "") -> None:
        """Indexes the file (one pass, nothing kept but offsets).

        Raises:
          RecordFileError: there is no such file, or it is neither a JSON list nor JSONL.
        """
        self.path, self.root, self.system_prompt = Path(path), Path(root), system_prompt
        self._index = build_index(self.path)
        self.digest, self.clips = self._index.digest, self._index.clips

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
          RecordError: with reason "bad_json", "bad_record", "unknown_role", "placeholder_mismatch" or
            "path_outside_root".
        """
        return parse_record(self.raw(i), self.key(i), self.root, self.system_prompt)

    def _fail_json(self, i: int, offset: int, what: str) -> None:
        line, column = self._index.line_column(self._index.starts[i] + offset)
        raise RecordError(
            f"not valid JSON at line {line}, column {column} of {self.path}: {what}", "bad_json", self.key(i)
        )


def parse_record(raw: Mapping[str, Any], key: str, root: str | Path, system_prompt: str = "") -> Record:
    """One released record as a `Record`.

    Args:
      raw: the decoded JSON object, in either layout.
      key: its name.
      root: media paths are relative to this folder and must stay inside it.
      system_prompt: prepended when the record has no system message; '' for none.

    Raises:
      RecordError: see `RecordFile.__getitem__`.
    """
    turns = _turns(raw, key)
    files = {"video": _files(raw, "video", key), "image": _files(raw, "image", key)}
    wanted = {"video": 0, "image": 0}
    messages = []
    for role, text in turns:
        if role != "user":
            messages.append({"role": role, "content": text})
            continue
        parts = []
        for piece in _PLACEHOLDER.split(text):
            if piece in ("<video>", "<image>"):
                kind = piece[1:-1]
                if wanted[kind] < len(files[kind]):
                    parts.append({"type": kind, "path": _resolve(root, files[kind][wanted[kind]], key)})
                wanted[kind] += 1
            elif piece.strip():
                parts.append({"type": "text", "text": piece.strip()})
        messages.append({"role": role, "content": parts})
    for kind, count in wanted.items():
        if count != len(files[kind]):
            raise PlaceholderError(
                f"{count} <{kind}> in the user's text but {len(files[kind])} {kind} file(s) {files[kind]}; "
                f"each file needs one <{kind}> where it belongs",
                key=key,
            )
    if system_prompt and all(m["role"] != "system" for m in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return Record(key=key, messages=tuple(messages), solution=raw.get("solution"))


def _turns(raw: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
    """(role, text) of every turn, roles by their standard names."""
    layouts = {"conversations": ("from", "value"), "messages": ("role", "content")}
    layout = next((name for name in layouts if name in raw), None)
    if layout is None:
        raise RecordError(f"neither 'conversations' nor 'messages' among its fields {sorted(raw)}", key=key)
    who, what = layouts[layout]
    if not isinstance(raw[layout], list) or not raw[layout]:
        raise RecordError(f"'{layout}' must be a list with a turn in it", key=key)
    turns = []
    for n, turn in enumerate(raw[layout]):
        if not isinstance(turn, dict) or not isinstance(turn.get(who), str) or not isinstance(turn.get(what), str):
            raise RecordError(f"turn {n} of '{layout}' must be an object with strings '{who}' and '{what}'", key=key)
        if turn[who] not in ROLES:
            known = ", ".join(ROLES)
            raise RecordError(f"turn {n} has the role {turn[who]!r}; known roles are {known}", "unknown_role", key)
        if not _is_unicode(turn[what]):
            raise RecordError(f"turn {n} holds half a surrogate pair (\\uD800-\\uDFFF), which is no text", key=key)
        turns.append((ROLES[turn[who]], turn[what]))
    return turns


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _files(raw: Mapping[str, Any], kind: str, key: str) -> list[str]:
    """The record's files of one kind, given under 'video' or 'videos' (a string, a list, or null for none)."""
    files: list[str] = []
    for field in (kind, kind + "s"):
        value = raw.get(field)
        entries = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
            raise RecordError(f"'{field}' must be a path or a list of paths, not {value!r}", key=key)
        files += entries
    return files


def _resolve(root: str | Path, relative: str, key: str) -> str:
    try:
        return str(resolve_media(root, relative))
    except RecordError as error:
        raise error.with_key(key) from None
