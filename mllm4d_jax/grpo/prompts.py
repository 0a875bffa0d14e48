"""Prompts of reinforcement learning: records without their answer, encoded once, with what their rewards need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from mllm4d_jax.data.group_encoder import EncodedGroup
from mllm4d_jax.data.stream import GroupStream
from mllm4d_jax.encode.encoder import media_name, media_parts
from mllm4d_jax.encode.example import Example
from mllm4d_jax.parallel import multihost
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
    """Prompts that this process samples from, and the state of the data after those of all processes."""

    prompts: tuple[Prompt, ...]
    position: int
    rejected: int


def prompts_of(group: EncodedGroup) -> list[Prompt]:
    """Return the usable prompts of an encoded group, in its order."""
    usable = ((i, r) for i, r in group.results.items() if not isinstance(r, RecordError))
    return [Prompt(group.questions.position, example, group.records[i]) for i, example in usable]


class PromptLoader:
    """Gives as many usable prompts as asked for at a time. Use as a context manager.

    An unusable record is passed over: the next one takes its place, so that every step has the same shape, and which
    prompts a step has does not depend on the number of processes. The position, groups consumed since the run began, is
    still the whole state.

    Each process encodes its own records, ahead of time. A process of whose records fewer are usable than it needs is
    given prompts that another one has too many of, and encodes them itself.
    """

    def __init__(self, stream: GroupStream, prompts: int) -> None:
        """
        Args:
          stream: of single questions, encoded with `records.as_prompt` or `as_scored_prompt`.
          prompts: given at a time, over all processes, which divide them.
        """
        self._stream, self._number = stream, prompts

    def next_step(self, stop: object = False) -> PromptStep | None:
        """This process's part of the next prompts; None once `stop` became true on a process. All of them call it.

        Raises:
          QuarantineError: too many records are unusable, or not one is usable.
          OtherProcessError: this process could go on and another one cannot.
        """
        options, found, usable, rejected = self._stream.options, {}, [], 0
        while len(usable) < self._number:
            start, count = self._stream.position, self._number - len(usable)
            problem, groups = None, None
            try:
                groups = self._stream.next_groups(stop if options.hosts == 1 else False, count)
            except Exception as error:  # the others must hear of it before it is raised
                problem = error
            found |= {prompt.position: prompt for group in groups or () for prompt in prompts_of(group)}
            flags = [int(place in found) for place in range(start, start + count)]
            asked, barren = bool(stop) or groups is None, self._stream.barren
            told = multihost.gather([problem is not None, asked, barren, self._stream.quarantine.rejected, *flags])
            multihost.refuse(told[:, 0], problem)
            if told[:, 2].all():
                raise self._stream.nothing_usable()
            if told[:, 1].any():
                return None
            rejected = int(told[:, 3].sum())
            usable += (start + np.flatnonzero(told[:, 4:].any(0))).tolist()
        shares = share_out([place % options.hosts for place in usable], options.hosts)
        mine = [usable[i] for i in shares[options.host]]
        return PromptStep(self.having(found, mine), self._stream.position, rejected)

    def having(self, found: Mapping[int, Prompt], positions: Sequence[int]) -> tuple[Prompt, ...]:
        """The prompts at some positions: those that were found, and others encoded now. All processes call it.

        Raises:
          RecordError: one of the others cannot be used here, and OtherProcessError for it on the other processes.
        """
        lacking = [place for place in positions if place not in found]
        more = multihost.together(lambda: dict(zip(lacking, self.again(lacking), strict=True)))
        return tuple({**found, **more}[place] for place in positions)

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


def share_out(homes: Sequence[int], processes: int) -> list[list[int]]:
    """Divide prompts evenly, so that few have to move: the numbers of each process's prompts.

    Args:
      homes: the process that has each prompt; `processes` divides their number.
    """
    each = len(homes) // processes
    there = [[i for i, home in enumerate(homes) if home == process] for process in range(processes)]
    over = [i for one in there for i in one[each:]]
    return [one[:each] + [over.pop(0) for _ in range(each - len(one))] for one in there]
