"""Completions: what sampling returns, and the host's record of it while the device is at work."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from mllm4d_jax.generate.policy import SamplingOptions

FINISH_REASONS = ("", "stop", "length", "stop_string")  # the record's codes; "" while a branch goes on

Detokenize = Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class SamplingStatistics:
    """What sampling cost."""

    steps: int = 0  # decode steps
    branch_steps: int = 0  # tokens the device computed in them, idle branches included
    wasted_branch_steps: int = 0  # those of them that are in no completion
    compactions: int = 0  # how often the branches were packed into smaller or longer arrays
    prefill_seconds: float = 0.0  # until the first tokens were there, encoding of videos included
    chunks: tuple[tuple[int, float], ...] = ()  # (steps, seconds) of each device call; the first of a shape compiles


@dataclasses.dataclass(frozen=True)
class Completions:
    """G completions of each of B prompts; on the host."""

    tokens: np.ndarray  # i32[B, G, T], `pad_id` after the end; an end token is kept
    lengths: np.ndarray  # i32[B, G], the end token included
    logprobs: np.ndarray  # f32[B, G, T] under the policy (`generate/policy.py`), 0 after the end
    finish_reason: tuple[tuple[str, ...], ...]  # B x G of "stop" (an end token), "length" (the cap) or "stop_string"

    def ids(self, prompt: int, branch: int) -> list[int]:
        """Tokens of one completion without the end token."""
        kept = self.lengths[prompt, branch] - (self.finish_reason[prompt][branch] == "stop")
        return self.tokens[prompt, branch, :kept].tolist()

    def texts(self, detokenize: Detokenize) -> list[list[str]]:
        """B x G texts without the end token. A stop text is part of its completion."""
        return [[detokenize(self.ids(p, b)) for b in range(self.tokens.shape[1])] for p in range(len(self.tokens))]

    @classmethod
    def join(cls, parts: Sequence[Completions], pad_id: int) -> Self:
        """The completions of several prompts, with as many branches each, one prompt after the other."""
        longest = max(part.tokens.shape[-1] for part in parts)

        def joined(name: str, value: float) -> np.ndarray:
            arrays = (getattr(part, name) for part in parts)
            more = ((x, ((0, 0), (0, 0), (0, longest - x.shape[-1]))) for x in arrays)
            return np.concatenate([np.pad(x, room, constant_values=value) for x, room in more])

        lengths, reasons = np.concatenate([part.lengths for part in parts]), (part.finish_reason for part in parts)
        return cls(joined("tokens", pad_id), lengths, joined("logprobs", 0.0), tuple(itertools.chain(*reasons)))


@dataclasses.dataclass(frozen=True)
class Sampled(Completions):
    """Completions with what they cost."""

    statistics: SamplingStatistics


class CompletionRecord:
    """Collects the device's tokens for the branches of one prompt and decides, alone, where each completion ends.

    Attributes:
      lengths: i32[G] tokens so far.
    """

    def __init__(self, limits: np.ndarray, options: SamplingOptions, detokenize: Detokenize | None) -> None:
        """
        Args:
          limits: i32[G], longest completion in tokens, at least 1.
          detokenize: text of token ids, every token of which gives at least one byte; needed for stop texts.
        """
        if options.stop and detokenize is None:
            raise ValueError(f"stop texts {list(options.stop)} need a detokenizer to be found in the tokens")
        shape = (*limits.shape, int(limits.max()))
        self._limits, self._options, self._detokenize = limits, options, detokenize
        self._tokens, self._logprobs = np.full(shape, options.pad_id, np.int32), np.zeros(shape, np.float32)
        self.lengths, self._reason = np.zeros(limits.shape, np.int32), np.zeros(limits.shape, np.int8)

    @property
    def finished(self) -> np.ndarray:
        """bool[G]."""
        return self._reason != 0

    @property
    def last_tokens(self) -> np.ndarray:
        """i32[G], the newest token of each branch; of branches with at least one."""
        return self._tokens[np.arange(len(self.lengths)), self.lengths - 1]

    def add(self, branches: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Takes the next tokens of some branches; those after an end are ignored.

        Args:
          branches: i32[b]; tokens: i32[b, n]; logprobs: f32[b, n].
        """
        live = self._reason[branches] == 0
        branches, tokens, logprobs = branches[live], tokens[live], logprobs[live]
        before, room = self.lengths[branches], self._limits[branches] - self.lengths[branches]
        ends = np.isin(tokens, self._options.eos_ids)
        last = np.where(ends.any(1), ends.argmax(1) + 1, tokens.shape[1] + 1)  # token that ends it, counted from 1
        count = np.minimum(np.minimum(last, tokens.shape[1]), room)
        which, number = np.nonzero(np.arange(tokens.shape[1]) < count[:, None])
        places = branches[which], before[which] + number
        self._tokens[places], self._logprobs[places] = tokens[which, number], logprobs[which, number]
        self.lengths[branches] += count
        self._reason[branches] = np.where(count == last, 1, np.where(count == room, 2, 0))
        if self._options.stop:
            for branch, start in zip(branches.tolist(), before.tolist(), strict=True):
                self._stop_at_text(branch, start)

    def _stop_at_text(self, branch: int, start: int) -> None:
        """Ends a branch after the token that completes a stop text, if one among tokens `start ..` does."""
        ids = self._tokens[branch, : self.lengths[branch]].tolist()
        end = first_stop(ids, start, self._options.stop, self._detokenize)
        if end is not None:
            self._tokens[branch, end:], self._logprobs[branch, end:] = self._options.pad_id, 0.0
            self.lengths[branch], self._reason[branch] = end, 3

    def result(self) -> Completions:
        """The completions of the one prompt."""
        reasons = tuple(FINISH_REASONS[code] for code in self._reason)
        return Completions(self._tokens[None], self.lengths[None], self._logprobs[None], (reasons,))


def first_stop(ids: Sequence[int], start: int, stops: Sequence[str], detokenize: Detokenize) -> int | None:
    """Number of tokens up to the one that completes a stop text, looking at tokens `start ..` only.

    A text of n bytes spans at most n tokens, so a window of that many tokens before the new ones is enough. A character
    cut by the window's start comes out as U+FFFD before the text that is looked for.
    """
    window = max(len(s.encode()) for s in stops)

    def found(end: int, begin: int) -> bool:
        text = detokenize(ids[max(0, begin - window) : end])
        return any(s in text for s in stops)

    # Most chunks hold none: one look at all of it, and token by token only when there is one.
    if not found(len(ids), start):
        return None
    return next((end for end in range(start + 1, len(ids) + 1) if found(end, end)), None)
