"""Asks a video language model which things move in a clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from data_prep.teacher.client import ChatRequest, user_message

MAX_ENTITIES = 20
ENTITY_SCHEMA = {
    "type": "object",
    "required": ["entities"],
    "properties": {
        "entities": {
            "type": "array",
            "maxItems": MAX_ENTITIES,
            "items": {
                "type": "object",
                "required": ["en", "cat"],
                "properties": {
                    "en": {"type": "string", "minLength": 1, "maxLength": 100},
                    "cat": {"type": "string", "minLength": 1, "maxLength": 50},
                },
            },
        }
    },
}
_PROMPT = f"""These are {{count}} frames of one video, in order of time.
List the active entities: people, animals, vehicles and things that move by themselves or are moved by someone at some \
point. Leave out whatever only seems to move because the camera does, and anything too small or blurred to be outlined.
Reply with JSON and nothing else, of this form:
{{{{"entities": [{{{{"en": "short English noun phrase that fits no other entity", "cat": "broad category"}}}}]}}}}
Name each entity once, the most prominent first, {MAX_ENTITIES} at most. If nothing moves, the list is empty."""


@dataclasses.dataclass(frozen=True)
class Entity:
    """Something that moves: `en` is a noun phrase to detect it by, `cat` a broad category ("person", "vehicle")."""

    en: str
    cat: str


def entity_request(model: str, frames: Sequence[bytes], *, max_tokens: int = 1024) -> ChatRequest:
    """The request for a clip. `frames`: JPEG files in order of time (`data_prep.sources.frames.encode_jpeg`)."""
    message = user_message(_PROMPT.format(count=len(frames)), frames)
    return ChatRequest(model, (message,), ENTITY_SCHEMA, temperature=0.0, max_tokens=max_tokens)


def parse_entities(reply: Any) -> tuple[Entity, ...]:
    """The entities of a reply that fits `ENTITY_SCHEMA`; white space tidied, names given twice or blank dropped."""
    found: dict[str, Entity] = {}
    for entry in reply["entities"]:
        name, category = " ".join(entry["en"].split()), " ".join(entry["cat"].split()).lower()
        if name and category:
            found.setdefault(name.casefold(), Entity(name, category))
    return tuple(found.values())
