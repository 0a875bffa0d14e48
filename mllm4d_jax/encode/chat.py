"""Chat templates of Qwen3-VL and Qwen2.5-VL, with images and videos expanded to their placeholders.

Messages are rendered to `Piece`s, never to a string that is searched afterwards: placeholders are put where an image or
video part stands, whatever the text around it says. Wherever one of our messages is valid, the text equals what the
published templates render (tools aside); which of their forms it is, `chat_template` reads from the model's folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mllm4d_jax.encode.chat_template import ChatForm
from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.tokenizer import Piece
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.qa.errors import PlaceholderError, RecordError

ROLES = ("system", "user", "assistant")
_THOUGHT = re.compile(r"(?:\s*<think>)?(.*?)</think>(.*)", re.DOTALL)
_PAD = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
_START, _END = Piece("<|vision_start|>", control=True), Piece("<|vision_end|>", control=True)


@dataclasses.dataclass(frozen=True)
class Visual:
    """An image or video as the prompt sees it: its grid and, for a video, the seconds of each temporal patch."""

    grid: Grid
    timestamps: tuple[float, ...] = ()


def video_timestamps(times: np.ndarray, temporal_patch_size: int) -> tuple[float, ...]:
    """Seconds of each temporal patch: the mean of its first and last frame's times (Qwen3-VL processor).

    Args:
      times: f64[T], seconds of the frames, before a short last patch is filled by repeating the last frame.
    """
    times = np.asarray(times, np.float64)
    short = -len(times) % temporal_patch_size
    groups = np.concatenate([times, np.repeat(times[-1:], short)]).reshape(-1, temporal_patch_size)
    return tuple(((groups[:, 0] + groups[:, -1]) / 2).tolist())


def timestamp_text(seconds: float) -> str:
    return f"<{seconds:.1f} seconds>"


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    family: str,
    *,
    visuals: Sequence[Visual] | None = None,
    merge_size: int = 2,
    add_generation_prompt: bool = False,
    gen_prefix: str = "",
    outer_markers: bool = False,
    form: ChatForm | None = None,
) -> list[Piece]:
    """Renders a conversation.

    Assistant text, the `<|im_end|>` that closes it and the newline after that are supervised, unless the message has
    "loss": False; headers are not, nor is the `<think>` line by which the prompt of a Thinking model opens an answer.
    The answer to the last question begins with its thought, an empty one if it has none; earlier answers are without
    theirs, as in the Thinking template.
    Published Qwen3-VL templates silently drop system messages after the first message. That would hide an instruction
    from training data, so it is an error here.

    Args:
      messages: as in `Record.messages`; media paths are not looked at.
      family: "qwen3_vl" or "qwen2_5_vl".
      visuals: one per image or video part, in reading order; None leaves a single placeholder for each.
      add_generation_prompt: end with the header of an assistant turn, and what opens its thought.
      gen_prefix: after that, a text with which the turn begins.
      outer_markers: Qwen3-VL videos only, keep the template's own vision_start/vision_end pair around the clip.
      form: default system prompt, and whether answers begin with a thought; None = the family's published Instruct.

    Raises:
      PlaceholderError: number or kind of `visuals` differs from the parts, or timestamps from the grid.
      RecordError: empty conversation, unknown role or part, a system message that is not first, media outside a user
        turn, text that is not valid Unicode; for Thinking models, a thought that is not one closed block at the front.
      ValueError: unknown family.
    """
    if family not in ("qwen3_vl", "qwen2_5_vl"):
        raise ValueError(f"unknown family {family!r} (known: qwen3_vl, qwen2_5_vl)")
    form = form or ChatForm.published(family)
    if not messages:
        raise RecordError("the conversation has no messages", "no_messages")
    parts = [_parts(m, i) for i, m in enumerate(messages)]
    queue = _queue(parts, visuals)
    pieces: list[Piece] = []
    if form.default_system is not None and messages[0]["role"] != "system":
        pieces += _turn("system", [Piece(form.default_system)])
    question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages))
    for i, (message, turn_parts) in enumerate(zip(messages, parts, strict=True)):
        body: list[Piece] = []
        target = _is_target(message)
        for part in turn_parts:
            if part["type"] == "text":
                body.append(Piece(part["text"], supervised=target))
            else:
                body += _visual_pieces(part["type"], next(queue), family, merge_size, outer_markers)
        if form.thinking and message["role"] == "assistant":
            opening = "" if i < question else form.opening
            body = _with_thought(rendered_text(body), i, opening, i == len(messages) - 1, target)
        pieces += _turn(message["role"], body, target)
    if add_generation_prompt:
        pieces += [Piece("<|im_start|>", control=True), Piece("assistant\n"), Piece(form.opening), Piece(gen_prefix)]
    return pieces


def _queue(parts: Sequence[Sequence[Mapping[str, Any]]], visuals: Sequence[Visual] | None) -> Iterator[Visual | None]:
    """The visuals in the order of their parts, which they have to fit; None of each where there are none."""
    kinds = [p["type"] for turn in parts for p in turn if p["type"] != "text"]
    if visuals is not None and kinds != [v.grid.modality for v in visuals]:
        raise PlaceholderError(
            f"the messages hold {len(kinds)} images and videos ({', '.join(kinds) or 'none'}), "
            f"got {len(visuals)} ({', '.join(v.grid.modality for v in visuals) or 'none'})"
        )
    return iter(visuals if visuals is not None else [None] * len(kinds))


def rendered_text(pieces: Sequence[Piece]) -> str:
    return "".join(p.rendered for p in pieces)


def _with_thought(text: str, index: int, opening: str, last: bool, target: bool) -> list[Piece]:
    """An answer of a Thinking model, with what its thought is opened by; without a thought if `opening` is ''."""
    found = _THOUGHT.fullmatch(text)
    thought, answer = (found[1].strip("\n"), found[2].lstrip("\n")) if found else ("", text)
    if any(tag in part for tag in ("<think>", "</think>") for part in (thought, answer)):
        raise RecordError(
            f"message {index} holds <think> or </think> otherwise than in one closed thought at its beginning (the "
            "model's template would drop a part of it silently): mend it",
            "bad_thought",
        )
    if not opening or not (thought or last):
        return [Piece(answer, supervised=target)]
    answer = answer.lstrip("\n")
    return [Piece(opening), Piece(f"{thought}\n</think>\n\n{answer}", supervised=target)]


def _is_target(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("loss", True)


def _turn(role: str, body: list[Piece], target: bool = False) -> list[Piece]:
    return [
        Piece("<|im_start|>", control=True),
        Piece(f"{role}\n"),
        *body,
        Piece("<|im_end|>", control=True, supervised=target),
        Piece("\n", supervised=target),
    ]


def _parts(message: Mapping[str, Any], index: int) -> list[Mapping[str, Any]]:
    """Content of one message as a checked list of parts."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RecordError(f"message {index} has role {shown(role)} (known: {', '.join(ROLES)})", "unknown_role")
    if role == "system" and index > 0:
        raise RecordError(
            f"message {index} is a system message; only the first message can be one (the published templates would "
            "drop it silently): merge it into the first or into a user message",
            "late_system",
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise RecordError(
            f"message {index} has content of type {type(content).__name__}, not text or parts", "bad_part"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            try:  # JSON can spell half of a surrogate pair, which is no character and cannot be tokenised
                part["text"].encode()
            except UnicodeEncodeError as error:
                reason = f"message {index} holds text that is not valid Unicode ({error.reason})"
                raise RecordError(reason, "bad_text") from error
            continue
        if kind not in _PAD:
            raise RecordError(f"message {index} has a part that is no text, image or video: {shown(part)}", "bad_part")
        if role != "user":
            raise RecordError(f"message {index} ({role}) has an {kind} part; only user messages can", "bad_part")
    return list(content)


def _visual_pieces(kind: str, visual: Visual | None, family: str, merge_size: int, outer_markers: bool) -> list[Piece]:
    pad = Piece(_PAD[kind], control=True)
    if visual is None:
        return [_START, pad, _END]
    grid = visual.grid
    if grid.h % merge_size or grid.w % merge_size:
        raise PlaceholderError(f"a grid of {grid.h}x{grid.w} patches cannot be merged {merge_size}x{merge_size}")
    per_frame = grid.h * grid.w // merge_size**2
    if kind == "image" or family == "qwen2_5_vl":
        return [_START, dataclasses.replace(pad, count=grid.t * per_frame), _END]
    if len(visual.timestamps) != grid.t:
        raise PlaceholderError(f"{len(visual.timestamps)} timestamps for a video of {grid.t} temporal patches")
    pads = dataclasses.replace(pad, count=per_frame)
    frames = [p for t in visual.timestamps for p in (Piece(timestamp_text(t)), _START, pads, _END)]
    return [_START, *frames, _END] if outer_markers else frames
