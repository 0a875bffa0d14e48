"""Encodes one group of questions: reads its records, decodes their clip once, and says what is wrong with each."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence

from mllm4d_jax.data.sources import Questions, RecordSource
from mllm4d_jax.encode.encoder import Encoder, Media, media_identity
from mllm4d_jax.encode.example import Example
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import Record, as_target

CACHE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class EncodedGroup:
    """A group of questions and what came of encoding it.

    Attributes:
      questions: the group.
      results: record index -> its Example, or what is wrong with the record, in the order of `questions`; without the
        records that were known to be unusable before.
      records: record index -> the prompt that was encoded; empty for records to be trained on.
    """

    questions: Questions
    results: Mapping[int, Example | RecordError]
    records: Mapping[int, Record] = dataclasses.field(default_factory=dict)

    @property
    def examples(self) -> tuple[Example, ...]:
        """What can be used of it."""
        return tuple(r for r in self.results.values() if not isinstance(r, RecordError))

    @property
    def errors(self) -> dict[int, RecordError]:
        """Record index -> what is wrong with it."""
        return {i: r for i, r in self.results.items() if isinstance(r, RecordError)}

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays; patches that examples share are counted once."""
        arrays = (a for e in self.examples for a in (e.patches, e.tokens, e.positions, e.supervised))
        return sum({id(a): a.nbytes for a in arrays}.values())


class LeastRecentMedia:
    """Decoded clips, bounded by the bytes of their patches; the one that was not used for longest goes first."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._items: OrderedDict[Hashable, Media] = OrderedDict()

    def get(self, identity: Hashable) -> Media | None:
        if identity in self._items:
            self._items.move_to_end(identity)
        return self._items.get(identity)

    def put(self, identity: Hashable, media: Media) -> None:
        size = media.patches.nbytes
        if size > self.max_bytes or identity in self._items:
            return
        self._items[identity] = media
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, dropped = self._items.popitem(last=False)
            self.bytes -= dropped.patches.nbytes


class GroupEncoder:
    """Questions -> examples, in this process or in a worker, one thread at a time. Pickles with an empty cache."""

    def __init__(
        self,
        sources: Sequence[RecordSource],
        encoder: Encoder,
        cache_bytes: int = CACHE_BYTES,
        as_prompt: Callable[[Record], Record] | None = None,
    ) -> None:
        """
        Args:
          sources: what `Questions.source` counts.
          encoder: record -> Example.
          cache_bytes: decoded clips kept for groups to come; 0 for none.
          as_prompt: makes the prompt of a record, or raises RecordError; the examples then end with the header of an
            assistant turn. A function of a module, so that it can be pickled. None encodes records to be trained on.
        """
        self.sources, self.encoder, self.cache_bytes = tuple(sources), encoder, cache_bytes
        self._as_prompt = as_prompt
        self._cache = LeastRecentMedia(cache_bytes)

    def __reduce__(self):
        return type(self), (self.sources, self.encoder, self.cache_bytes, self._as_prompt)

    def with_cache(self, cache_bytes: int) -> GroupEncoder:
        """The same with an empty cache of another size."""
        return type(self)(self.sources, self.encoder, cache_bytes, self._as_prompt)

    def __call__(self, questions: Questions) -> EncodedGroup:
        """Encodes a group; what is wrong with a record names its key.

        Records that turn out to be about different media (their source knows that by a hash only) are encoded apart.
        """
        source, prompting = self.sources[questions.source], self._as_prompt is not None
        made_of = self._as_prompt or as_target
        results: dict[int, Example | RecordError] = {}
        by_media: dict[Hashable, dict[int, Record]] = {}
        for i in questions.indices:
            try:
                record = made_of(source[i])
                by_media.setdefault(media_identity(record), {})[i] = record
            except RecordError as error:
                results[i] = error.with_key(source.key(i))
        for records in by_media.values():
            results |= self._encode(records)
            # A decoder can die of a signal or of memory running out, which is no fault of the clip: one more try.
            again = {i: records[i] for i in records if _crashed(results[i])}
            results |= self._encode(again) if again else {}
        if prompting:
            prompts = {i: record for records in by_media.values() for i, record in records.items()}
            return EncodedGroup(questions, {i: results[i] for i in questions.indices}, prompts)
        return EncodedGroup(questions, {i: _with_target(results[i], source.key(i)) for i in questions.indices})

    def _encode(self, records: dict[int, Record]) -> dict[int, Example | RecordError]:
        more = {} if self._as_prompt is None else {"add_generation_prompt": True}
        encoded = self.encoder.encode_group(list(records.values()), cache=self._cache, **more)
        return dict(zip(records, encoded, strict=True))

    def refuse(self, questions: Questions, message: str, reason: str) -> EncodedGroup:
        """The answer for a group that could not be encoded at all."""
        source = self.sources[questions.source]
        return EncodedGroup(questions, {i: RecordError(message, reason, source.key(i)) for i in questions.indices})


def _crashed(result: Example | RecordError) -> bool:
    return isinstance(result, RecordError) and result.reason == "decoder_crash"


def _with_target(result: Example | RecordError, key: str) -> Example | RecordError:
    """The first token of an example has nothing before it that could predict it."""
    if isinstance(result, RecordError) or result.supervised[1:].any():
        return result
    message = "holds no text of the assistant that is to be learned (loss: false and weight: 0 say that it is not)"
    return RecordError(message, "no_target", key)
