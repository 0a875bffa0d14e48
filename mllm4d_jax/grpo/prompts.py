"""Prompts of reinforcement learning: records without their answer, encoded once, with what their rewards need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from mllm4d_jax.data.group_encoder import EncodedGroup
from mllm4d_jax.data.stream import GroupStream
from mllm4d_jax.encode.encoder import media_name, media_parts
from mllm4d_jax.encode.example import Example
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import Record


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      position: in the global order.
      example: encoded, with the header of the assistant's turn at its end.
      record: as `as_prompt` returns it.
    """

    position: int
    example: Example
    record: Record

    @property
    def key(self) -> str:
        return self.record.key

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return "\n".join(part["text"] for part in self._parts(self.record.messages[-1:]) if part["type"] == "text")

    @property
    def media(self) -> tuple[str, ...]:
        """Paths (or names, of frames that came with the record) of its images and videos."""
        return tuple(media_name(part) for part in media_parts(self.record))

    def described(self) -> dict[str, Any]:
        """What reward functions of a user's own see of it: id, question, media, solution, messages."""
        return {
            "id": self.key,
            "question": self.question,
            "media": list(self.media),
            "solution": self.record.solution,
            "messages": self.record.messages,
        }

    @staticmethod
    def _parts(messages: Sequence[Any]) -> list[Any]:
        contents = (m["content"] for m in messages)
        return [p for c in contents for p in ([{"type": "text", "text": c}] if isinstance(c, str) else c)]


@dataclasses.dataclass(frozen=True)
class PromptStep:
    """Prompts to sample from, and the stream's state after them."""

    prompts: tuple[Prompt, ...]
    position: int
    rejected: int


def prompts_of(group: EncodedGroup) -> list[Prompt]:
    """Return the usable prompts of an encoded group, in its order."""
    usable = ((i, r) for i, r in group.results.items() if not isinstance(r, RecordError))
    return [Prompt(group.questions.position, example, group.records[i]) for i, example in usable]


class PromptLoader:
    """Gives as many usable prompts as asked for at a time. Use as a context manager.

    An unusable record is passed over: the next one takes its place, so that every step has the same shape. The
    position, groups consumed since the run began, is still the whole state.
    """

    def __init__(self, stream: GroupStream, prompts: int) -> None:
        """
        Args:
          stream: of single questions, one at a time, encoded with `records.as_prompt` or `as_scored_prompt`.
          prompts: given at a time.
        """
        self._stream, self._number = stream, prompts

    def next_step(self, stop: object = False) -> PromptStep | None:
        """The next prompts; None when `stop` became true first.

        Raises:
          QuarantineError: too many records are unusable.
        """
        prompts: list[Prompt] = []
        while len(prompts) < self._number:
            groups = self._stream.next_groups(stop)
            if groups is None:
                return None
            prompts += [prompt for group in groups for prompt in prompts_of(group)]
        return PromptStep(tuple(prompts), self._stream.position, self._stream.quarantine.rejected)

    def again(self, positions: Sequence[int]) -> tuple[Prompt, ...]:
        """Prompts that were given before, one per position.

        Raises:
          RecordError: one of them cannot be used now.
        """
        prompts, encode = [], self._stream.encoder.with_cache(0)
        for position in positions:
            group = encode(self._stream.order[position])
            for error in group.errors.values():
                raise error
            prompts += prompts_of(group)
        return tuple(prompts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()
