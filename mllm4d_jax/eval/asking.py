"""Questions -> rows that the sampler takes: who asks which, how, and which share a prefix."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import Example
from mllm4d_jax.files.remote import absolute
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import Span
from mllm4d_jax.qa.options import INSTRUCTION, write_question
from mllm4d_jax.qa.questions import BenchmarkQuestion
from mllm4d_jax.qa.records import Message, Record, user_content, video_part
from mllm4d_jax.qa.system_prompt import resolve_system_prompt
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.rows.pack import place_branches
from mllm4d_jax.rows.rows import Group, share_prefix
from mllm4d_jax.rows.shape import RowShape


class EvaluationError(ValueError):
    """The questions cannot be asked as configured."""


@dataclasses.dataclass(frozen=True)
class Manner:
    """How questions are asked.

    Attributes:
      mode: "direct", "st_cot" or "file".
      system: the system prompt; None = the question's own, if it has one.
      blind: without the video.
    """

    mode: str
    system: str | None
    blind: bool

    @classmethod
    def of(cls, prompt: Mapping[str, str], blind: bool = False) -> Self:
        """Return what the config group `prompt` wants.

        Raises:
          EvaluationError: prompt.file and prompt.mode contradict each other; ProcessorError: the file cannot be used.
        """
        mode, file = prompt["mode"], prompt["file"]
        if bool(file) != (mode == "file"):
            raise EvaluationError(
                f"prompt.mode = {mode!r} and prompt.file = {file!r}: mode 'file' and a file go together"
            )
        preset = "st_cot" if mode == "st_cot" else ""
        return cls(mode, resolve_system_prompt(file=file) if file else resolve_system_prompt(preset), blind)

    def text(self, question: str, choices: Mapping[str, str]) -> str:
        """Return a question as it is asked: with its options, if it has any.

        It ends with the request for a letter, unless a system prompt says how to answer.
        """
        return write_question(question, choices, INSTRUCTION if self.mode == "direct" else "") if choices else question

    def conversation(self, key: str, messages: Iterable[Message]) -> Record:
        """Return a conversation to be continued, with the manner's system prompt, if it has one, for its own."""
        if self.system is not None:
            others = (message for message in messages if message["role"] != "system")
            messages = ({"role": "system", "content": self.system}, *others)
        return Record(key, tuple(messages))

    def record(self, item: BenchmarkQuestion) -> Record:
        """Return the conversation to be continued: the file's own text if it has one, else question and options.

        Asked directly, the text ends with the request for nothing but the answer, the benchmark's own or else that for
        a letter; with a system prompt that says how to answer it has none.

        Raises:
          RecordError: the question has no file and is not asked blind.
        """
        if item.media is None and not self.blind:
            raise RecordError("has no video file", "missing_file", item.id)
        media, direct = self._media(item), self.mode == "direct"
        if item.prompt is None:
            text = self.text(item.question, item.choices)
            parts = [next(media["video"]), {"type": "text", "text": text}]
        else:
            parts = user_content(item.direct_prompt if direct and item.direct_prompt else item.prompt, media)
        parts = [part for part in parts if part["type"] == "text" or not self.blind]
        messages = [{"role": "user", "content": parts}]
        if item.system is not None:
            messages.insert(0, {"role": "system", "content": item.system})
        return self.conversation(item.id, messages)

    def _media(self, item: BenchmarkQuestion) -> Mapping[str, Iterator[dict[str, Any]]]:
        """The parts that stand for the placeholders of a question; asked blind, parts that are left out again."""
        if self.blind:
            return {kind: itertools.repeat({"type": kind}) for kind in ("video", "image")}
        files = item.files or {"video": (item.media,), "image": ()}
        return {
            "video": (video_part(absolute(file), item.span) for file in files["video"]),
            "image": ({"type": "image", "path": absolute(file)} for file in files["image"]),
        }


class ItemSource:
    """Questions as a source of records; see `data.sources.RecordSource`."""

    def __init__(self, items: Sequence[BenchmarkQuestion], manner: Manner) -> None:
        self.items, self.manner = tuple(items), manner
        self.name, self.digest = "the questions", ""
        numbers: dict[tuple[str, Span | None], int] = {}
        clips = ((item.video, item.span) for item in items)
        self.clips = np.array([numbers.setdefault(clip, len(numbers)) for clip in clips], np.int32)

    def __len__(self) -> int:
        return len(self.items)

    def key(self, i: int) -> str:
        return self.items[i].id

    def __getitem__(self, i: int) -> Record:
        return self.manner.record(self.items[i])


class ShuffledEncoder(Encoder):
    """Shows the frames of every clip in random order, under the times of the true order."""

    def __init__(self, *args: Any, seed: int, **options: Any) -> None:
        """`seed`: of the order; everything else as for `Encoder`."""
        super().__init__(*args, **options)
        self._seed = seed

    def shown_frames(self, path: str, frames: np.ndarray) -> np.ndarray:
        """Return them in an order that follows from the file's name: the same everywhere and for all questions."""
        rng = np.random.default_rng([self._seed, *Path(path).name.encode()])
        return frames[rng.permutation(len(frames))]


def share_of_host(
    items: Sequence[BenchmarkQuestion], done: Collection[str], host: int, hosts: int
) -> list[tuple[int, ...]]:
    """The questions a host has to ask, as numbers, video by video: it has every `hosts`-th video of the benchmark.

    Args:
      done: ids that are left out. Whose a video is does not depend on them.
    """
    videos: dict[tuple[str, Span | None], list[int]] = {}
    for i, item in enumerate(items):
        videos.setdefault((item.video, item.span), []).append(i)
    mine = list(videos.values())[host::hosts]
    left = (tuple(i for i in numbers if items[i].id not in done) for numbers in mine)
    return [numbers for numbers in left if numbers]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How questions become rows.

    Attributes:
      rows: that are laid out together.
      per_row: most questions of a row.
      shape: how they are laid out and padded.
    """

    rows: int
    per_row: int
    shape: RowShape

    def groups(self, examples: Sequence[Example]) -> list[Group]:
        """The questions about a video as rows, of nearly equal number."""
        parts = -(-len(examples) // self.per_row)
        chunks = (examples[len(examples) * n // parts : len(examples) * (n + 1) // parts] for n in range(parts))
        return [group for chunk in chunks for group in share_prefix(chunk, self.shape.visual_token_ids)]

    def collate(self, groups: Sequence[Group]) -> tuple[ModelInputs, list[list[str]]]:
        """One batch, filled up with empty rows: (inputs, key of the question in each slot, "" for none).

        Raises:
          ValueError: more groups than rows.
        """
        if len(groups) > self.rows:
            raise ValueError(f"{len(groups)} groups for {self.rows} rows")
        rows = [[group] for group in groups] + [[] for _ in range(self.rows - len(groups))]
        inputs = self.shape.collate(rows).inputs
        layout = inputs.layout
        keys = [[""] * layout.slots for _ in rows]
        for row, group in zip(keys, groups, strict=False):
            places = place_branches([group.branches], layout.length)[0][0]
            for example, (slot, _) in zip(group.examples, places, strict=True):
                row[slot] = example.key
        return inputs, keys
