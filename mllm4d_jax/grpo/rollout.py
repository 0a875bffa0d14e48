"""Completions of a step with everything that is known about them: immutable, on the host, and storable."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import jax
import numpy as np

from mllm4d_jax.grpo.advantages import DEAD_SPREAD
from mllm4d_jax.grpo.batch import RolloutBatch
from mllm4d_jax.parallel import multihost

_ARRAYS: Mapping[str, Any] = MappingProxyType({"tokens": np.int32, "lengths": np.int32, "logprobs": np.float32})
_OF_EACH = ("finish", "texts", "rewards")  # tuples with an entry per completion


@dataclasses.dataclass(frozen=True, eq=False)
class Rollouts:
    """G completions of each of B prompts, C = B G, prompt by prompt.

    Attributes:
      step: optimiser step they are for, from 0.
      policy_step: optimiser steps done by the policy that drew them.
      positions: of the prompts, in the global order of the data.
      position, rejected: the data's state after them.
      tokens: i32[C, T]; lengths: i32[C], the end token included.
      logprobs: f32[C, T] of the policy that drew them.
      finish: C of "stop", "length", "stop_string".
      texts: C, with what the prompt has opened (`<think>`, Thinking models), without the end token.
      rewards: C, each name -> value, "total" among them.
      seconds: phase -> seconds it took.
      counts: what sampling did, name -> number, as metrics.jsonl has them.
    """

    step: int
    policy_step: int
    positions: tuple[int, ...]
    position: int
    rejected: int
    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    finish: tuple[str, ...]
    texts: tuple[str, ...]
    rewards: tuple[Mapping[str, float], ...]
    seconds: Mapping[str, float]
    counts: Mapping[str, float]

    @property
    def branches(self) -> int:
        """Completions of a prompt, G."""
        return len(self.lengths) // len(self.positions)

    @property
    def totals(self) -> np.ndarray:
        """f32[C] rewards that are learned from."""
        return np.array([values["total"] for values in self.rewards], np.float32)

    @property
    def informative(self) -> np.ndarray:
        """bool[B], the completions of the prompt have different rewards."""
        return np.ptp(self.totals.reshape(-1, self.branches), axis=1) > DEAD_SPREAD

    def batch(self, length: int) -> RolloutBatch:
        """As the objective reads it, tokens padded to `length` (at least the longest completion).

        Raises:
          ValueError: a completion is longer.
        """
        if self.lengths.max() > length:
            raise ValueError(f"a completion of {self.lengths.max()} tokens does not fit arrays of {length}")

        def padded(x: np.ndarray) -> np.ndarray:
            return np.pad(x[:, :length], ((0, 0), (0, max(0, length - x.shape[1]))))

        return RolloutBatch(
            tokens=padded(self.tokens),
            mask=(np.arange(length) < self.lengths[:, None]).astype(np.float32),
            groups=np.repeat(np.arange(len(self.positions), dtype=np.int32), self.branches),
            old_logprobs=padded(self.logprobs),
            rewards=self.totals,
            truncated=np.array([reason == "length" for reason in self.finish]),
        )

    def take(self, prompts: Sequence[int]) -> Self:
        """The completions of some of the prompts."""
        chosen = [p * self.branches + b for p in prompts for b in range(self.branches)]
        return dataclasses.replace(
            self,
            positions=tuple(self.positions[p] for p in prompts),
            tokens=self.tokens[chosen],
            lengths=self.lengths[chosen],
            logprobs=self.logprobs[chosen],
            **{name: tuple(getattr(self, name)[i] for i in chosen) for name in _OF_EACH},
        )

    @classmethod
    def join(cls, parts: Sequence[Self], pad_id: int) -> Self:
        """Completions of several prompts after one another; seconds and counts add up, the state is the last part's."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.tokens.shape[1] for part in parts)

        def widened(x: np.ndarray, value: float) -> np.ndarray:
            return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)

        def summed(name: str) -> dict[str, float]:
            keys = dict.fromkeys(key for part in parts for key in getattr(part, name))
            return {key: sum(getattr(part, name).get(key, 0.0) for part in parts) for key in keys}

        return dataclasses.replace(
            parts[-1],
            tokens=np.concatenate([widened(part.tokens, pad_id) for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            logprobs=np.concatenate([widened(part.logprobs, 0.0) for part in parts]),
            seconds=summed("seconds"),
            counts=summed("counts"),
            **{
                name: tuple(value for part in parts for value in getattr(part, name))
                for name in ("positions", *_OF_EACH)
            },
        )

    def shared(self, pad_id: int) -> Self:
        """The completions of all processes, one process after the other, the same on each; all of them call it.

        Each has as many prompts. Seconds are those of the slowest process, counts add up.
        """
        if jax.process_count() == 1:
            return self
        file = io.BytesIO()
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ARRAYS}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        np.savez(file, rest=np.frombuffer(json.dumps(rest).encode(), np.uint8), **arrays)
        parts = []
        for told in multihost.gather_bytes(file.getvalue()):
            with np.load(io.BytesIO(told), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in _ARRAYS}
                parts.append(self.from_json(json.loads(stored["rest"].tobytes()) | arrays))
        seconds = {name: max(part.seconds[name] for part in parts) for name in self.seconds}
        return dataclasses.replace(self.join(parts, pad_id), seconds=seconds)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint. float32 values survive the way through JSON's numbers to the bit."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return dataclasses.asdict(self) | arrays

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """What `to_json` returned, after a way through JSON."""
        values = {name: np.asarray(stored[name], kind) for name, kind in _ARRAYS.items()}
        tuples = {name: tuple(stored[name]) for name in ("positions", *_OF_EACH)}
        return cls(**{**stored, **values, **tuples})
