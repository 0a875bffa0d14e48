"""What a model is asked for when it writes cold-start reasoning, and what of its reply is used.

The model gets the answer and the measured values, so that the reasoning is right, and has to write as if it had only
seen the video. Replies that give that away are refused (`path_problem`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.cold_start.r1_items import R1Question
from data_prep.questions.wording import vector_text
from data_prep.sources.frames import encode_jpeg
from data_prep.teacher.client import ChatRequest, user_message
from data_prep.teacher.json_schema import exact_object, text_schema
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule, sample_indices
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.qa.errors import MediaError
from mllm4d_jax.qa.special_tokens import QWEN_TOKENS
from mllm4d_jax.qa.system_prompt import ST_COT

MAX_PATH_CHARS = 20_000
MAX_TOKENS = 4096  # of a reply; as long as a completion may get in reinforcement learning
MAX_FRAME_PIXELS = 512 * 512
PATH_SCHEMA = exact_object(chain_of_thought=text_schema(MAX_PATH_CHARS))
# Phrases, in lower case, by which a text admits that its writer was handed the result.
_LEAK = re.compile(
    r"ground[ -]?truth|answer key|told the answer|given the (correct )?answer|answer ((is|was) )?(given|provided)"
    r"|(expected|given|known|provided|provided correct|reference|supplied) answer"
    r"|(given|known|provided) facts|provided measurement|(provided|supplied) value"
)
_TAGS = ("<thinking>", "</thinking>", "<answer>", "</answer>")
_FORBIDDEN = ("<video>", "<image>", *(content for content, _, _ in QWEN_TOKENS))
# What the record's "value" is, by scenario; lengths in metres.
_MEANING: Mapping[str, str] = {
    "camera_absolute_distance": "straight-line distance between the camera's two places",
    "camera_relative_direction": "camera displacement along its own right, down and forward axes at the start frame",
    "object_absolute_distance": "straight-line distance between the object's two places",
    "object_camera_absolute_distance": "distance from the camera's place at the start frame to the nearest visible "
    "point of the object at the end frame (not to its centre)",
    "object_camera_relative_distance": "change of the distance from the camera to the object's nearest visible point, "
    "end minus start",
    "object_camera_lateral_direction": "the object's displacement along the right axis of the start frame's camera",
    "object_camera_longitudinal_direction": "the object's displacement along the viewing axis of the start frame's "
    "camera, away from it positive",
}
_REQUEST = """{frames}
Below is a multiple-choice question about the video. Write the reasoning with which a careful viewer, who has nothing \
but the video, would get to the right option.

Question:
{question}

Facts, for you alone, so that the reasoning comes out right (positions and lengths in metres):
{facts}

Rules for the reasoning:
- Present positions and lengths as estimates read off the video. Never mention this list, nor that anything was handed \
to you, nor the words "ground truth".
- Use the positions of the list unchanged in the two states, and null where the list says null.
- Describe what these very frames show, in your own words; do not repeat the question's text.
- Follow this form to the letter; it is the instruction that the reader of your reasoning gets:

{form}

Reply with JSON and nothing else: {{"chain_of_thought": "<thinking>...</thinking><answer>...</answer>"}}"""


def path_request(
    item: R1Question, frames: Sequence[bytes], numbers: Sequence[int] | None, model: str, temperature: float, seed: int
) -> ChatRequest:
    """Return the request for one reasoning path.

    Args:
      frames: JPEG files in order of time.
      numbers: their numbers as the question counts frames; None if unknown.
      seed: another one makes it another request.
    """
    shown = f"These are {len(frames)} frames of one video, in order of time"
    shown += ", evenly spread over it." if numbers is None else f": its frames {', '.join(map(str, numbers))}."
    text = _REQUEST.format(frames=shown, question=item.question, facts=_facts(item), form=item.system or ST_COT)
    message = user_message(text, frames)
    return ChatRequest(model, (message,), PATH_SCHEMA, temperature=temperature, max_tokens=MAX_TOKENS, seed=seed)


def _facts(item: R1Question) -> str:
    solution = item.solution
    lines = [f"- right option: {solution.answer}"]
    for kind, centers in (("camera", solution.camera_center), ("object", solution.object_center)):
        names = ("start frame", "end frame") if len(centers) == 2 else [f"state {n + 1}" for n in range(len(centers))]
        lines += [f"- {kind} centre, {name}: {vector_text(c, 3)}" for name, c in zip(names, centers, strict=True)]
        lines += [] if centers else [f"- {kind} centre: null at both frames"]
    if item.frames:
        lines.append(f"- start frame: {item.frames[0]}, end frame: {item.frames[1]}")
    if item.value is not None:
        value = vector_text(item.value, 3) if isinstance(item.value, tuple) else f"{item.value:.3f}"
        lines.append(f"- {_MEANING.get(item.scenario, 'measured value')}: {value}")
    return "\n".join(lines)


def item_frames(item: R1Question, path: str, num_frames: int, pool: DecodePool) -> tuple[list[bytes], list[int] | None]:
    """Return JPEG files of at most `num_frames` frames, and their numbers as the question counts them, None if unknown.

    Where the record says how many frames a model sees, the same ones are decoded and some of them taken, evenly spread
    and always with the two that are asked about. Large frames are scaled down to about `MAX_FRAME_PIXELS`.

    Raises:
      MediaError: the video is missing, damaged or too slow to decode, or too short ("frame_count").
    """
    count = item.frames[2] if item.frames else num_frames
    resize = ResizeRule("per_frame", 2, 1, 1.0, float(MAX_FRAME_PIXELS))
    clip = pool.read(path, SampleRule("uniform", count, None, *(item.span or ())), resize)
    if not item.frames:
        return [encode_jpeg(frame) for frame in clip.frames], None
    if len(clip.frames) != count:
        raise MediaError(
            f"{path} gives {len(clip.frames)} frames, its question was asked about {count}: it is not that clip",
            "frame_count",
        )
    numbers = spread(count, num_frames, item.frames[:2])
    return [encode_jpeg(clip.frames[n]) for n in numbers], numbers


def spread(total: int, num_frames: int, wanted: Sequence[int] = ()) -> list[int]:
    """Return at most `num_frames` >= 2 of `total` >= 2 frame numbers, evenly spread, with the one or two wanted."""
    found = sample_indices("uniform", total, 1.0, num_frames=min(total, num_frames))
    fixed = np.zeros(len(found), bool)
    for number in wanted:
        distance = np.where(fixed, total, np.abs(found - number))
        nearest = int(distance.argmin())
        found[nearest], fixed[nearest] = number, True
    return sorted(set(found.tolist()))


def completion_of(reply: Any, answer: str) -> str:
    """Return the completion in a reply that fits `PATH_SCHEMA`.

    A text with any of the four tags is taken as it is, and the reward judges its form and answer. A text without tags
    is the inside of the thinking; the answer, which the model knew, is added.
    """
    text = reply["chain_of_thought"].strip()
    if any(tag in text for tag in _TAGS):
        return text
    return f"<thinking>{text}</thinking><answer>{answer}</answer>"


def path_problem(completion: str) -> tuple[str, str] | None:
    """Return (reason, detail) why a completion must not be trained on, None if it may.

    Reasons: "special_token" (a media placeholder or a control token of the chat format stands in it), "bad_text" (half
    a surrogate pair), "leak" (it admits that the result was given, whatever its capitals and line breaks).
    """
    token = next((token for token in _FORBIDDEN if token in completion), None)
    if token is not None:
        return "special_token", f"it contains {token}"
    try:
        completion.encode("utf-8")
    except UnicodeEncodeError as error:
        return "bad_text", f"it is not valid Unicode ({error.reason})"
    plain = " ".join(completion.casefold().split())
    leak = _LEAK.search(plain)
    return ("leak", f"it says {leak[0]!r}") if leak else None
