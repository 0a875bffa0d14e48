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

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm4d_jax.qa.errors import PlaceholderError, RecordError
from mllm4d_jax.qa.media_path import resolve_media
from mllm4d_jax.qa.record import Record

ROLES = {"user": "user", "human": "user", "system": "system", "assistant": "assistant", "gpt": "assistant"}


_PLACEHOLDER = re.compile("(<video>|<image>)")


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
