"""What a record is, and the one parser of the released formats: for training, evaluation and cold start.

Two layouts are accepted, in a JSON list or as JSONL:

- conversations (MLLM4D-2M, cold start): `{"video": str | [str], "image": ..., "conversations": [{"from", "value"}]}`;
- messages (MLLM4D-R1-30k): `{"messages": [{"role", "content"}], "videos": [str], "images": [str], "solution": ...}`.

`<video>` and `<image>` in user text stand for the files, in order. Text around them is stripped of white space at
both ends and blank pieces are dropped, as in the loader the released checkpoints were trained with; system and
assistant text is kept to the letter. That loader took every role besides "user" and "system" for the assistant,
"human" included; here "human" is the user, "gpt" is the assistant and any other role is an error.

Fields of other programs' files that change what a record means are read as those programs read them: `system` beside
the turns (LLaMA-Factory, ms-swift), `loss` (ms-swift) and `weight` (OpenAI, axolotl) of a turn, `video_start` and
`video_end` (qwen-vl-utils). `unread_fields` names what is not read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm4d_jax.files.quoting import shown
from mllm4d_jax.qa.errors import PlaceholderError, RecordError
from mllm4d_jax.qa.media_paths import Span, resolve_media
from mllm4d_jax.qa.rewards import Solution, is_number

ROLES = {"user": "user", "human": "user", "system": "system", "assistant": "assistant", "gpt": "assistant"}
LAYOUTS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_PLACEHOLDER = re.compile("(<video>|<image>)")
_SPAN = ("video_start", "video_end")
_LEARNED = ("loss", "weight")  # of a turn: whether it is learned
# What this project's own files say about a question besides; training does not need it.
_NOTES = (
    "id question_type source_id scale label value object_name frames question choices options answer category subtask"
)
_FIELDS = frozenset([*LAYOUTS, "video", "videos", "image", "images", "solution", "system", *_SPAN, *_NOTES.split()])

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation, media paths already resolved.

    Attributes:
      key: "file.json#17"; every error about the record names it.
      messages: {"role": "system"|"user"|"assistant", "content": str or a list of parts}; a part is
        {"type": "text", "text": str}, {"type": "video", "path": str}, {"type": "video", "frames":
        stored_frames.StoredFrames} (frames that came with the record) or {"type": "image", "path": str}. A video of
        which only a part is meant also has "span": Span. An assistant's turn that is not to be learned has "loss":
        False.
      solution: the record's field of that name as the file has it, None without one; rewards read it (`qa/rewards.py`).
    """

    key: str
    messages: tuple[Message, ...]
    solution: Any = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The turns of a record and its files, as it has them in either layout.

    Attributes:
      layout: the field that they were in, a key of `LAYOUTS`.
      turns: {"role", "loss": as in `Record`, "content": text}.
      files: "video" and "image" -> paths, as many as there are placeholders in what the user says.
      spans: which part of each video is meant; None for all of it.
    """

    layout: str
    turns: tuple[Message, ...]
    files: Mapping[str, Sequence[str]]
    spans: tuple[Span | None, ...]

    def question(self) -> tuple[str | None, str]:
        """Return (system message, the user's text) of a record that asks one thing; a last answer is left out.

        Raises:
          RecordError: other turns than one of the user behind at most one of the system.
        """
        asked = unanswered(self.turns)
        roles = [turn["role"] for turn in asked]
        if roles not in (["user"], ["system", "user"]):
            raise RecordError(
                f"'{self.layout}' asks in the turns {shown(roles)}; a question is one turn of the user, after at most "
                "one of the system"
            )
        return (asked[0]["content"] if len(asked) == 2 else None), asked[-1]["content"]


def parse_record(raw: Mapping[str, Any], key: str, root: str | Path, system_prompt: str = "") -> Record:
    """Return one released record as a `Record`.

    Args:
      raw: the decoded JSON object, in either layout.
      key: its name.
      root: media paths are relative to this folder and must stay inside it.
      system_prompt: prepended when the record has no system message; '' for none.

    Raises:
      RecordError: with reason "bad_record", "unknown_role", "placeholder_mismatch", "path_outside_root" or "bad_path".
    """
    try:
        read = read_conversation(raw)
        paths = {kind: [resolve_media(root, file) for file in files] for kind, files in read.files.items()}
    except RecordError as error:
        raise error.with_key(key) from None
    videos, images = map(video_part, paths["video"], read.spans), ({"type": "image", "path": p} for p in paths["image"])
    parts = {"video": iter(videos), "image": images}
    messages = [t | {"content": user_content(t["content"], parts)} if t["role"] == "user" else t for t in read.turns]
    if system_prompt and all(m["role"] != "system" for m in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return Record(key=key, messages=tuple(messages), solution=raw.get("solution"))


def as_prompt(record: Record) -> Record:
    """Return the record without the assistant's last turns, if it has any.

    Raises:
      RecordError: reason "no_question": nothing is asked.
    """
    messages = unanswered(record.messages)
    if not messages or messages[-1]["role"] != "user":
        raise RecordError("does not end with a user's turn, so there is nothing to answer", "no_question", record.key)
    return dataclasses.replace(record, messages=messages)


def as_target(record: Record) -> Record:
    """Return a record to be trained on, as it is.

    Raises:
      RecordError: reason "empty_answer": a turn that would be learned is blank, so that the model would learn to end
        its own turns at once.
    """
    for message in record.messages:
        learned, said = message["role"] == "assistant" and message.get("loss", True), message["content"]
        if learned and isinstance(said, str) and not said.strip():
            problem = 'has an empty turn of the assistant, which is nothing to learn (unless it has "loss": false)'
            raise RecordError(problem, "empty_answer", record.key)
    return record


def as_scored_prompt(record: Record) -> Record:
    """Return `as_prompt` of a record whose solution has the form that the built-in rewards read.

    Raises:
      RecordError: as `as_prompt`, or SolutionError.
    """
    prompt = as_prompt(record)
    try:
        Solution.from_record(prompt.solution)
    except RecordError as error:
        raise error.with_key(record.key) from None
    return prompt


def fields_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an object that it has: a table writes null for one that a row lacks, and an object of nulls
    for an object."""

    def is_null(value: Any) -> bool:
        return value is None or isinstance(value, Mapping) and bool(value) and all(map(is_null, value.values()))

    return {name: value for name, value in raw.items() if not is_null(value)}


def read_conversation(raw: Mapping[str, Any]) -> Conversation:
    """Return the turns and files of a record in either layout.

    Raises:
      RecordError: neither layout or both, a turn that is none, or other files than placeholders; names the field.
    """
    raw = fields_of(raw)
    layouts = [name for name in LAYOUTS if name in raw]
    if len(layouts) != 1:
        raise RecordError(f"'conversations' or 'messages', one of them, must be among its fields {shown(sorted(raw))}")
    layout = layouts[0]
    if not isinstance(raw[layout], list) or not raw[layout]:
        raise RecordError(f"'{layout}' must be a list of turns with one in it, not {shown(raw[layout])}")
    turns = [_turn(turn, f"'{layout}', turn {n},", *LAYOUTS[layout]) for n, turn in enumerate(raw[layout])]
    files = {kind: media_files(raw, kind) for kind in ("video", "image")}
    asked = "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
    for kind, named in files.items():
        if asked.count(f"<{kind}>") != len(named):
            raise PlaceholderError(
                f"'{layout}' has {asked.count(f'<{kind}>')} <{kind}> in the user's text for {len(named)} {kind} "
                f"file(s) {shown(named)}; each file needs one <{kind}> where it belongs"
            )
    return Conversation(layout, _with_system(raw, turns), files, video_spans(raw, len(files["video"])))


def unread_fields(raw: Mapping[str, Any]) -> set[str]:
    """Return the fields of a record, and of its turns as "turn.NAME", that nothing reads."""
    found = fields_of(raw).keys() - _FIELDS
    for layout, roles in LAYOUTS.items():
        turns = raw.get(layout)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                found.update(f"turn.{name}" for name in fields_of(turn).keys() - {*roles, *_LEARNED})
    return found


def video_spans(raw: Mapping[str, Any], videos: int) -> tuple[Span | None, ...]:
    """Return which part of each of so many videos a record means, by `video_start` and `video_end` as qwen-vl-utils has
    them: seconds of the file's own time line, frames at both ends included, a negative start for the beginning.

    With one video each is a number, else a list with one entry per video; null = not given.

    Raises:
      RecordError: something else, or a start that is not before its end.
    """
    ends = []
    for field in _SPAN:
        value = raw.get(field)
        listed = [None] * videos if value is None else value if isinstance(value, list) else [value]
        if len(listed) != videos or not all(second is None or is_number(second) for second in listed):
            raise RecordError(
                f"'{field}' must be a number of seconds, one for each of {videos} videos, not {shown(value)}"
            )
        ends.append([None if second is None else float(second) for second in listed])
    for start, end in zip(*ends, strict=True):
        if end is not None and not max(start or 0.0, 0.0) < end:
            raise RecordError(f"'video_start' ({start}) must be before 'video_end' ({end}), and that above 0")
    return tuple(None if span == (None, None) else span for span in zip(*ends, strict=True))


def video_part(path: str, span: Span | None = None) -> dict[str, Any]:
    """Return the part of a message that is a video; `span`: which part of it is meant, None for all."""
    return {"type": "video", "path": path} | ({} if span is None else {"span": span})


def media_files(raw: Mapping[str, Any], kind: str) -> list[str]:
    """Return a record's files of one kind, given under 'video' or 'videos': a path, a list, or null for none.

    Raises:
      RecordError: something else, or both fields are given and differ.
    """
    given: dict[str, list[str]] = {}
    for field in (kind, kind + "s"):
        value = raw.get(field)
        entries = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) and entry.strip() for entry in entries):
            raise RecordError(f"'{field}' must be a path or a list of paths, not {shown(value)}")
        if entries:
            given[field] = entries
    found = list(given.values()) or [[]]
    if found[0] != found[-1]:
        raise RecordError(f"'{kind}' and '{kind}s' are two names of one field and differ: {shown(given)}")
    return found[0]


def text_field(raw: Mapping[str, Any], field: str, default: str | None = None) -> str:
    """Return a text of the record, or the default if it has none.

    Raises:
      RecordError: another type, or a blank unless `default` is blank.
    """
    value = default if raw.get(field) is None else raw[field]
    if not isinstance(value, str) or not (value.strip() or default == ""):
        wanted = "a text" if default == "" else "a text that is not empty"
        raise RecordError(f"'{field}' must be {wanted}, not {shown(value)}")
    check_text(value, f"'{field}'")
    return value


def one_video(raw: Mapping[str, Any]) -> str:
    """Return the path of a question's video. Raises RecordError unless there is one, and no image."""
    videos = media_files(raw, "video")
    if len(videos) != 1:
        field = "videos" if "videos" in fields_of(raw) else "video"
        raise RecordError(f"'{field}' must be the path of one video, not {shown(raw.get(field))}")
    if media_files(raw, "image"):
        raise RecordError("it has images; a question is about one video")
    return videos[0]


def user_content(text: str, parts: Mapping[str, Iterator[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the parts of a user's text, each placeholder replaced by the next image or video of its kind."""
    pieces = (piece.strip() for piece in _PLACEHOLDER.split(text))
    return [
        next(parts[piece[1:-1]]) if _PLACEHOLDER.fullmatch(piece) else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]


def without_placeholders(text: str) -> str:
    """Return a user's text without its placeholders, stripped."""
    return _PLACEHOLDER.sub("", text).strip()


def unanswered(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages without the assistant's turns at their end."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return tuple(messages[:end])


def _turn(turn: Any, where: str, who: str, what: str) -> Message:
    """Return a turn of a file with its role by the standard name, and whether it is to be learned."""
    if not isinstance(turn, dict) or not isinstance(turn.get(who), str) or not isinstance(turn.get(what), str):
        raise RecordError(f"{where} must be an object with strings '{who}' and '{what}', not {shown(turn)}")
    if turn[who] not in ROLES:
        raise RecordError(
            f"{where} has the role {shown(turn[who])}; known roles are {', '.join(ROLES)}", "unknown_role"
        )
    check_text(turn[what], where)
    read = {"role": ROLES[turn[who]], "content": turn[what]}
    return read if _is_learned(turn, where) or read["role"] != "assistant" else read | {"loss": False}


def _is_learned(turn: Mapping[str, Any], where: str) -> bool:
    """Return what `loss` or `weight` of a turn says; without them it is learned. Both matter for the assistant only."""
    given = {name: turn[name] for name in _LEARNED if turn.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            known = "only true and false, or 1 and 0, are supported: a turn is learned or not"
            raise RecordError(f"{where} has the {name} {shown(value)}; {known}")
    if len(set(map(bool, given.values()))) > 1:
        raise RecordError(f"{where} says in 'loss' and 'weight' that it is learned and that it is not: {shown(given)}")
    return all(given.values())


def _with_system(raw: Mapping[str, Any], turns: Sequence[Message]) -> tuple[Message, ...]:
    """Return the turns, the record's field `system` before them; '' or null there is none.

    Raises:
      RecordError: it is no text, or not that of the system's turn.
    """
    given = raw.get("system")
    if given is None or given == "":
        return tuple(turns)
    if not isinstance(given, str):
        raise RecordError(f"'system' must be a text, not {shown(given)}")
    check_text(given, "'system'")
    own = [turn["content"] for turn in turns if turn["role"] == "system"]
    if own and own[0] != given:
        raise RecordError(f"'system' and the turn of the system differ: {shown(given)} and {shown(own[0])}")
    return tuple(turns) if own else ({"role": "system", "content": given}, *turns)


def check_text(text: str, where: str) -> None:
    """Raise RecordError, which begins with `where`, for a text that is not valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError(f"{where} holds half a surrogate pair (\\uD800-\\uDFFF), which is no text") from None
