"""Completions as they end. Branches that end make room for others of their prompt, prompts for those that wait."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator

import numpy as np

from mllm4d_jax.generate.compiled import CompiledPrograms
from mllm4d_jax.generate.completions import CompletionRecord, Completions, Detokenize, SamplingStatistics
from mllm4d_jax.generate.decoding import Asked
from mllm4d_jax.generate.inputs import Call, Prompts
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.programs import ChunkInputs, KeyNumbers
from mllm4d_jax.generate.slots import NO_PROMPT, Packing
from mllm4d_jax.parallel.place import place_rows


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is on the devices at a time."""

    prompts: int  # at least 1; filled up to a multiple of the devices that they are split over
    branches: int = 0  # of a prompt; 0 for all. Rows of questions always have all


@dataclasses.dataclass(frozen=True, eq=False)
class _Going:
    """A prompt with branches that have not ended."""

    call: Call  # of it alone
    following: np.ndarray  # i32[G], M-RoPE position of each branch's first new token
    record: CompletionRecord


class CompletionStream:
    """Iterates over (number of a prompt, its completions), in the order in which prompts end.

    Attributes:
      statistics: of what was sampled so far.
    """

    def __init__(
        self,
        sampler: CompiledPrograms,
        weights: tuple,
        prompts: Iterable[Prompts],
        options: SamplingOptions,
        seed: np.uint32,
        limits: Limits,
        detokenize: Detokenize | None,
    ) -> None:
        """Arguments as of `Sampler.stream`."""
        self._sampler, self._weights, self._options, self._detokenize = sampler, weights, options, detokenize
        # Texts are the host's matter: no program for each.
        self._on_device = dataclasses.replace(options, stop=())
        self._seed, self._limits, self._waiting = seed, limits, iter(prompts)
        self._next = next(self._waiting, None)
        self._packing = Packing.empty(sampler.ladder.whole(limits.prompts), 0, 0)
        self._going: dict[int, _Going] = {}
        self._count, self._cache, self._own, self._layers = 0, None, None, None
        self._form = sampler.form(weights)
        self.statistics = SamplingStatistics()

    def __iter__(self) -> Iterator[tuple[int, Completions]]:
        while self._next is not None or self._going:
            self._admit()
            yield from self._ended()
            if self._has_room:  # the first token ended completions: nothing to decode before others take their place
                continue
            if self._going:
                self._advance()
                yield from self._ended()

    def _ended(self) -> Iterator[tuple[int, Completions]]:
        for number, going in list(self._going.items()):
            if going.record.finished.all():
                del self._going[number]
                done = going.record.result()
                # The first token of each comes from prefill.
                self._spent(wasted_branch_steps=-int((done.lengths - 1).sum()))
                yield number, done
        self._packing = self._packing.refilled(self._unfinished)

    @property
    def _has_room(self) -> bool:
        """Whether rows are free for the prompts that come next."""
        return self._next is not None and len(self._next) <= len(self._packing.free)

    @property
    def _unfinished(self) -> dict[int, np.ndarray]:
        return {number: ~going.record.finished for number, going in self._going.items()}

    def _spent(self, **more: float | tuple) -> None:
        """Adds to the statistics."""
        sums = {name: getattr(self.statistics, name) + value for name, value in more.items()}
        self.statistics = dataclasses.replace(self.statistics, **sums)

    def _admit(self) -> None:
        """Prefills prompts that wait into rows that are free."""
        started, arrived = time.monotonic(), []
        while self._has_room:
            arrived.append(self._prefill(self._next))
            self._next = next(self._waiting, None)
        for numbers, call, (following, tokens, logprobs) in arrived:
            following, tokens, logprobs = map(np.asarray, (following, tokens, logprobs))
            for i, number in enumerate(numbers):
                one = call.take(np.array([i]))
                record = CompletionRecord(one.limits[0], self._options, self._detokenize)
                record.add(np.arange(one.limits.shape[1]), tokens[i], logprobs[i])
                self._going[number] = _Going(one, following[i], record)
        if arrived:
            self._spent(prefill_seconds=time.monotonic() - started)

    def _prefill(self, prompts: Prompts) -> tuple[range, Call, tuple]:
        """Dispatches prefill and insertion; returns the prompts' numbers and what `_admit` waits for."""
        sampler, call, branches = self._sampler, prompts.call, prompts.call.limits.shape[1]
        size, count = sampler.ladder.shards, len(prompts)
        if count > size:
            raise ValueError(f"{count} prompts together, where {size} are prefilled at a time")
        filled = prompts.take(np.arange(size) * (np.arange(size) < count))  # repeats the first
        keys = KeyNumbers(self._seed, filled.call.prompt_ids, filled.call.numbers)
        cache, own, *small = sampler.start(
            self._weights,
            place_rows(filled.inputs, sampler.mesh),
            # They come from the learner's mesh, whose devices may stand in another order (as they do on a TPU when the
            # sampler has a mesh of its own), and a program takes no arguments of two orders.
            place_rows(filled.features, sampler.mesh),
            sampler.everywhere(keys),
            filled.prefix,
            branches=branches,
            options=self._on_device,
            apart=self._form != "stacked",
        )
        width = branches if call.asked is not None or not self._limits.branches else self._limits.branches
        first = min(call.slots + sampler.chunk, call.most)  # what the first chunk fills
        self._make_room(cache.visible.shape[1], min(width, branches), first, call.most)
        places = np.full(size, len(self._packing.rows), np.int32)
        places[:count] = self._packing.free[:count]
        numbers = range(self._count, self._count + count)
        self._count += count
        self._packing = self._packing.placed(places[:count], list(numbers), branches)
        rows = sampler.everywhere(places)
        self._cache, self._own = sampler.insert(rows, cache, own, cache=self._cache, own=self._own)
        return numbers, call, tuple(small)

    def _make_room(self, prefix: int, width: int, needed: int, most: int) -> None:
        """Makes the caches, or larger ones, for a prefix of so many tokens; the other arguments as of `_grow`."""
        sampler = self._sampler
        if self._cache is None:
            self._packing = dataclasses.replace(self._packing.wider(width), slots=sampler.ladder.slots(needed, most))
            shape, apart = self._packing.shape, self._form != "stacked"
            self._cache, self._own = sampler.empty(self._weights, shape=shape, prompt=prefix, apart=apart)
        if prefix > self._cache.visible.shape[1]:
            self._cache = sampler.grow_prompts(self._cache, prompt=prefix)
        self._grow(width, needed, most)

    def _grow(self, width: int, needed: int, most: int) -> None:
        """Has the branches' cache hold `width` branches of a row and `needed` positions, where `most` can be needed."""
        now, ladder = self._packing, self._sampler.ladder
        width, slots = max(width, now.branches.shape[1]), max(now.slots, ladder.slots(needed, most))
        if (width, slots) != now.shape[1:]:
            self._packing = dataclasses.replace(now.wider(width), slots=slots)
            self._own = self._sampler.grow_branches(self._own, width=width, slots=slots)
            self._spent(compactions=1)

    def _advance(self) -> None:
        """Decodes a chunk."""
        sampler, started = self._sampler, time.monotonic()
        if self._form != "stacked" and self._layers is None:
            self._layers = sampler.layers(self._weights, kernels=self._form == "kernels")
        if self._next is None:
            self._shrink()
        feed, used = self._feed()
        begun = 0 if feed.asked is None else feed.asked.slots
        needed = int((begun + feed.index)[used].max()) + sampler.chunk - 1
        most = max(going.call.most for going in self._going.values())
        self._grow(0, needed, most)
        # The cache by its name: a jitted function of any arguments donates none that comes by its place.
        sent = dict(own=self._own, feed=sampler.everywhere(feed), layers=self._layers)
        how = dict(options=self._on_device, chunk=sampler.chunk)
        self._own, *drawn, steps = sampler.decode(self._weights, self._cache, **sent, **how)
        steps = int(steps)
        tokens, logprobs = (np.asarray(x)[..., :steps] for x in drawn)
        for i, number in enumerate(self._packing.rows.tolist()):
            if used[i].any():
                branches = self._packing.branches[i][used[i]]
                self._going[number].record.add(branches, tokens[i][used[i]], logprobs[i][used[i]])
        work = steps * used.size
        chunk = (steps, time.monotonic() - started)
        self._spent(steps=steps, branch_steps=work, wasted_branch_steps=work, chunks=(chunk,))

    def _shrink(self) -> None:
        """Packs what is left into smaller arrays, if it fits them."""
        sampler, now = self._sampler, self._packing
        wanted = sampler.ladder.pack(now, self._unfinished)
        if wanted is now:
            return
        rows, columns = sampler.everywhere(now.places(wanted))
        # Branches of rows that all stay where they are need no other device.
        if wanted.rows is now.rows:
            rows = None
        else:
            self._cache = sampler.take_prompts(self._cache, rows)
        self._own = sampler.take_branches(self._own, rows, columns)
        self._packing = wanted
        self._spent(compactions=1)

    def _feed(self) -> tuple[ChunkInputs, np.ndarray]:
        """What the device is sent for the next chunk, and bool[b, g] of the branches that go on."""
        packing = self._packing
        shape, i32 = packing.branches.shape, np.int32
        last, position, limits, numbers, lengths, begun = (np.zeros(shape, i32) for _ in range(6))
        index, ids, asked = np.ones(shape, i32), np.zeros(shape, np.uint32), None
        for i, number in enumerate(packing.rows.tolist()):
            if number == NO_PROMPT:
                continue
            going, at = self._going[number], packing.used[i]
            b, call, record = packing.branches[i][at], going.call, going.record
            last[i, at], index[i, at], position[i, at] = record.last_tokens[b], record.lengths[b], going.following[b]
            limits[i, at], ids[i, at], numbers[i, at] = call.limits[0, b], call.prompt_ids[0, b], call.numbers[0, b]
            if call.asked is not None:
                lengths[i, at], begun[i, at] = call.asked[0, b], call.slots
                asked = Asked(lengths, begun)
        keys = KeyNumbers(self._seed, ids, numbers)
        enough = np.int32(len(packing.rows) if self._next is None else len(self._next))
        return ChunkInputs(last, ~packing.used, position, keys, limits, asked, index, enough), packing.used
