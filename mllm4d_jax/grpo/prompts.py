"""Prompts of reinforcement learning: records without their answer, encoded once, with what their rewards need."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Self

from mllm4d_jax.data.stream import GroupStream, StreamItem
from mllm4d_jax.encode.example import Example
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import Record, as_prompt


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
        found = (part for part in self._parts(self.record.messages) if part["type"] != "text")
        return tuple(part["frames"].name if "frames" in part else part["path"] for part in found)

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

    def next_step(self, stop: threading.Event | None = None) -> PromptStep | None:
        """The next prompts; None when `stop` was set first.

        Raises:
          QuarantineError: too many records are unusable.
        """
        found: list[Prompt] = []
        while len(found) < self._number:
            items = self._stream.next_groups(stop)
            if items is None:
                return None
            found += [prompt for item in items for prompt in self._prompts(item)]
        return PromptStep(tuple(found), self._stream.position, self._stream.quarantine.rejected)

    def again(self, positions: Sequence[int]) -> tuple[Prompt, ...]:
        """Prompts that were given before, one per position.

        Raises:
          RecordError: one of them cannot be used now.
        """
        found = []
        for position in positions:
            questions = self._stream.order[position]
            results = self._stream.encoder(questions)
            for result in results:
                if isinstance(result, RecordError):
                    raise result
            found += self._prompts(StreamItem(questions, tuple(zip(questions.indices, results, strict=True)), position))
        return tuple(found)

    def _prompts(self, item: StreamItem) -> list[Prompt]:
        source = self._stream.mixture.sources[item.questions.source]
        usable = ((i, result) for i, result in item.results if not isinstance(result, RecordError))
        return [Prompt(item.position, example, as_prompt(source[i])) for i, example in usable]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()
