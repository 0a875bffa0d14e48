"""A model with one clip in front of it: the clip is decoded, seen by the vision tower and run through the decoder once.

Every question is computed by the same programs from the same cached prefix, alone. What is answered therefore does not
depend on what was asked before, nor on whether all questions were known from the start.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Hashable, Sequence

import jax
import ml_collections
import numpy as np
from flax import nnx

from mllm4d_jax.encode.encoder import Encoder, Media
from mllm4d_jax.encode.example import Example
from mllm4d_jax.encode.grids import unpatchify
from mllm4d_jax.generate.decoding import PromptCache
from mllm4d_jax.generate.policy import SamplingOptions, banned_token_ids
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.models.qwen_vl import QwenVL, vision_geometry
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.reasoning import with_prompt
from mllm4d_jax.qa.records import Record
from mllm4d_jax.rows.batch import ModelInputs, RowLayout, collate
from mllm4d_jax.rows.rows import share_prefix

_CHUNK = 16  # tokens between two looks at the answer
# Prefixes and questions are padded to multiples of these, so that similar ones share one compiled program.
_PREFIX_MULTIPLE, _QUESTION_MULTIPLE = 128, 64


@dataclasses.dataclass(frozen=True)
class SeenFrame:
    """A frame as the model saw it: u8[H, W, 3] RGB, and its time in seconds; None for an image."""

    pixels: np.ndarray
    time: float | None


class OneClip:
    """The media of the records that were encoded last; see `encoder.MediaCache`."""

    def __init__(self) -> None:
        self._identity: Hashable = None
        self.media: Media | None = None

    def get(self, identity: Hashable) -> Media | None:
        return self.media if identity == self._identity else None

    def put(self, identity: Hashable, media: Media) -> None:
        self._identity, self.media = identity, media

    def encode(self, encoder: Encoder, record: Record) -> Example:
        """Return a conversation ready to be continued; its media are read unless they are here. Raises RecordError."""
        (found,) = encoder.encode_group([record], add_generation_prompt=True, cache=self)
        if isinstance(found, RecordError):
            raise found
        return found

    def frames(self, encoder: Encoder) -> list[SeenFrame]:
        """Return what the model sees of the media, in order; the repeated last frame of an odd number is left out."""
        found, start = [], 0
        for item in self.media.items:
            grid = item.visual.grid
            patches = self.media.patches[start : start + grid.t * grid.h * grid.w]
            times = (None,) if item.times is None else item.times.tolist()
            pixels = unpatchify(patches, grid, encoder.config)
            found += [SeenFrame(frame, seconds) for frame, seconds in zip(pixels, times, strict=False)]
            start += len(patches)
        return found


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said, and what that took.

    Attributes:
      text: with the `<think>` that its prompt opened, if it did.
      tokens: generated; `stopped`: by an end token, not by the limit.
      visual_tokens: of its prompt.
      prefix_s: seconds for the clip; 0 where it was there already.
      question_s: until the first token; decode: (steps, seconds) of every call after it, the first of which compiles.
    """

    text: str
    tokens: int
    stopped: bool
    visual_tokens: int
    prefix_s: float
    question_s: float
    decode: tuple[tuple[int, float], ...]


class ClipSession:
    """Answers questions about a clip one after the other. The prefix that was used last is kept on the devices."""

    def __init__(self, model: QwenVL, encoder: Encoder, config: ml_collections.ConfigDict) -> None:
        """`config`: of the "infer" task: how tokens are drawn, and how many."""
        self._encoder, self._config, self._sizes = encoder, config, model.config
        graphdef, state = nnx.split(model)
        self._weights, self._sampler = (state,), Sampler(graphdef, model.mesh, chunk=_CHUNK)
        self._prefix: tuple[Example, PromptCache] | None = None
        self._options = SamplingOptions(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            eos_ids=encoder.tokenizer.eos_ids,
            banned_ids=banned_token_ids(encoder.tokenizer, model.config.text.vocab_size),
        )

    def see(self, example: Example) -> int:
        """Run what stands before a question, unless it is there; return its number of tokens."""
        (group,) = share_prefix([example], self._visual_ids)
        beginning = _part(example, slice(0, group.shared))
        if self._prefix is None or not _same(self._prefix[0], beginning):
            self._prefix = None  # gives its memory back first
            length = _padded(group.shared, _PREFIX_MULTIPLE)
            geometry = vision_geometry(self._sizes)
            inputs = collate([beginning], geometry, visual_token_ids=self._visual_ids, length=length)
            self._prefix = beginning, jax.block_until_ready(self._sampler.prefix(self._weights, inputs))
        return group.shared

    def answer(self, example: Example) -> Answer:
        """Answer the question with which an encoded conversation ends."""
        started = time.monotonic()
        shared = self.see(example)
        seen = time.monotonic()
        config, tokenizer = self._config, self._encoder.tokenizer
        out = self._sampler.generate(
            self._weights,
            _branch(example, shared),
            prompt_ids=[[0]],
            branches=1,
            max_new_tokens=config.max_new_tokens,
            options=self._options,
            seed=config.seed,
            prefix=self._prefix[1],
        )
        return Answer(
            text=with_prompt(example.text, out.texts(tokenizer.decode)[0][0]),
            tokens=int(out.lengths[0, 0]),
            stopped=out.finish_reason[0][0] == "stop",
            visual_tokens=int(np.isin(example.tokens, self._visual_ids).sum()),
            prefix_s=seen - started,
            question_s=out.statistics.prefill_seconds,
            decode=out.statistics.chunks,
        )

    @property
    def _visual_ids(self) -> Sequence[int]:
        return self._sizes.image_token_id, self._sizes.video_token_id


def _part(example: Example, part: slice) -> Example:
    tokens, supervised = example.tokens[part], example.supervised[part]
    return dataclasses.replace(example, tokens=tokens, positions=example.positions[:, part], supervised=supervised)


def _same(a: Example, b: Example) -> bool:
    return a.patches is b.patches and np.array_equal(a.tokens, b.tokens) and np.array_equal(a.positions, b.positions)


def _padded(tokens: int, multiple: int) -> int:
    return math.ceil(tokens / multiple) * multiple


def _branch(example: Example, shared: int) -> ModelInputs:
    """What follows the first `shared` tokens, as the only branch of a row whose prefix was run before."""
    question = _part(example, slice(shared, None))
    n, length = len(question.tokens), _padded(len(question.tokens), _QUESTION_MULTIPLE)
    tokens, segments = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
    positions = np.zeros((3, 1, length), np.int32)
    tokens[0, :n], segments[0, :n], positions[:, 0, :n] = question.tokens, 1, question.positions
    none = np.full((1, length), -1, np.int32)
    return ModelInputs(tokens, positions, segments, none, None, RowLayout(0, 1, length, packed=False))
