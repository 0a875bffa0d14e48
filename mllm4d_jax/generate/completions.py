"""Completions: what sampling returns, and the host's record of it while the device is at work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.slots import Packing

FINISH_REASONS = ("", "stop", "length", "stop_string")  # the record's codes; "" while a branch goes on

Detokenize = Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class SamplingStatistics:
    """What one call cost."""

    steps: int  # decode steps
    branch_steps: int  # tokens the device computed in them, idle branches included
    wasted_branch_steps: int  # those of them that are in no completion
    compactions: int  # how often the branches were packed into smaller or longer arrays
    prefill_seconds: float  # until the first tokens were there, encoding of videos included
    chunks: tuple[tuple[int, float], ...]  # (steps, seconds) of each device call; the first of a shape compiles


@dataclasses.dataclass(frozen=True)
class Completions:
    """G completions of each of B prompts; on the host."""

    tokens: np.ndarray  # i32[B, G, T], `pad_id` after the end; an end token is kept
    lengths: np.ndarray  # i32[B, G], the end token included
    logprobs: np.ndarray  # f32[B, G, T] under the policy (`generate/policy.py`), 0 after the end
    finish_reason: tuple[tuple[str, ...], ...]  # B x G of "stop" (an end token), "length" (the cap) or "stop_string"
    statistics: SamplingStatistics

    def ids(self, prompt: int, branch: int) -> list[int]:
        """Tokens of one completion without the end token."""
        kept = self.lengths[prompt, branch] - (self.finish_reason[prompt][branch] == "stop")
        return self.tokens[prompt, branch, :kept].tolist()

    def texts(self, detokenize: Detokenize) -> list[list[str]]:
        """B x G texts without the end token. A stop text is part of its completion."""
        return [[detokenize(self.ids(p, b)) for b in range(self.tokens.shape[1])] for p in range(len(self.tokens))]


class CompletionRecord:
    """Collects the device's tokens and decides, alone, where each completion ends.

    Attributes:
      finished: bool[B, G].
    """

    def __init__(self, limits: np.ndarray, options: SamplingOptions, detokenize: Detokenize | None) -> None:
        """
        Args:
          limits: i32[B, G], longest completion in tokens, at least 1.
          detokenize: text of token ids, every token of which gives at least one byte; needed for stop texts.
        """
        if options.stop and detokenize is None:
            raise ValueError(f"stop texts {list(options.stop)} need a detokenizer to be found in the tokens")
        shape = (*limits.shape, int(limits.max()))
        self._limits, self._options, self._detokenize = limits, options, detokenize
        self._tokens, self._logprobs = np.full(shape, options.pad_id, np.int32), np.zeros(shape, np.float32)
        self._lengths, self._reason = np.zeros(limits.shape, np.int32), np.zeros(limits.shape, np.int8)

    @property
    def finished(self) -> np.ndarray:
        return self._reason != 0

    def last_tokens(self, rows: np.ndarray, branches: np.ndarray, step: int) -> np.ndarray:
        """Token number `step - 1` of the branches at (rows, branches)."""
        return self._tokens[rows, branches, step - 1]

    def add(self, packing: Packing, tokens: np.ndarray, logprobs: np.ndarray, step: int) -> None:
        """Takes the tokens number `step ..` of some branches; those of branches that have ended are ignored.

        Args:
          packing: says whose they are.
          tokens: i32[b, g, n]; logprobs: f32[b, g, n].
        """
        per_branch = (packing.row_grid, packing.branches, tokens, logprobs)
        rows, branches, tokens, logprobs = (x[packing.used] for x in per_branch)
        before = self._lengths.copy()
        for i in range(tokens.shape[-1]):
            live = self._reason[rows, branches] == 0
            r, b, new = rows[live], branches[live], tokens[live, i]
            self._tokens[r, b, step + i], self._logprobs[r, b, step + i] = new, logprobs[live, i]
            self._lengths[r, b] = step + i + 1
            at_limit = step + i + 1 >= self._limits[r, b]
            ended = np.isin(new, self._options.eos_ids) if self._options.eos_ids else np.zeros(len(new), bool)
            self._reason[r, b] = np.where(ended, 1, np.where(at_limit, 2, 0))
        if self._options.stop:
            for place in np.argwhere(self._lengths > before).tolist():
                self._stop_at_text(tuple(place), int(before[tuple(place)]))

    def _stop_at_text(self, place: tuple[int, int], start: int) -> None:
        """Ends a branch after the token that completes a stop text, if one among tokens `start ..` does."""
        ids = self._tokens[place][: self._lengths[place]].tolist()
        end = first_stop(ids, start, self._options.stop, self._detokenize)
        if end is not None:
            self._tokens[place][end:], self._logprobs[place][end:] = self._options.pad_id, 0.0
            self._lengths[place], self._reason[place] = end, 3

    def result(self, statistics: SamplingStatistics) -> Completions:
        """The completions; the waste in the statistics is filled in here."""
        useful = int((self._lengths - 1).sum())  # the first token of each comes from prefill
        statistics = dataclasses.replace(statistics, wasted_branch_steps=statistics.branch_steps - useful)
        reasons = tuple(tuple(FINISH_REASONS[code] for code in row) for row in self._reason)
        return Completions(self._tokens, self._lengths, self._logprobs, reasons, statistics)


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
