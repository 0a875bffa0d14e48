"""Rewards on held-out prompts, sampled greedily (or as configured) and always in the same order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.sources import Questions
from mllm4d_jax.files import jsonl
from mllm4d_jax.grpo.actor import Actor
from mllm4d_jax.grpo.prompts import Prompt, PromptStep
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import as_prompt

log = logging.getLogger(__name__)


class HeldOut:
    """The held-out prompts of a run and the file of its evaluations, `evals.jsonl`."""

    def __init__(self, path: Path, encoder: GroupEncoder, actor: Actor, *, limit: int, at_once: int) -> None:
        """
        Args:
          path: the file.
          encoder: of one source.
          actor: one completion per prompt, with the rewards of the run.
          limit: prompts; at_once: prompts of a batch.
        """
        self._path, self._encoder, self._actor, self._at_once = path, encoder, actor, at_once
        self._number = min(limit, len(encoder.sources[0]))

    def done(self, step: int) -> bool:
        """Whether the evaluation after so many steps is in the file."""
        return any(row["step"] == step for row in jsonl.read_steps(self._path))

    def run(self, weights: tuple, step: int) -> dict[str, Any]:
        """Evaluates the policy after `step` steps and adds a row to the file: means of all rewards.

        Raises:
          RecordError: not one of the prompts can be used.
        """
        found: list[tuple[Mapping[str, float], int]] = []
        unusable = 0
        for start in tqdm(range(0, self._number, self._at_once), desc="held-out", unit="batch", leave=False):
            prompts = self._prompts(range(start, min(start + self._at_once, self._number)))
            unusable += min(self._at_once, self._number - start) - len(prompts)
            if not prompts:
                continue
            full = prompts + prompts[:1] * (self._at_once - len(prompts))  # one shape for every batch
            rollouts = self._actor.draw(PromptStep(tuple(full), 0, 0), weights, 0, step).rollouts
            found += list(zip(rollouts.rewards, rollouts.lengths.tolist(), strict=True))[: len(prompts)]
        if not found:
            raise RecordError("not one of the held-out prompts can be used", "no_prompt", self._encoder.sources[0].name)
        row = {"step": step, "n": len(found), "unusable": unusable, **mean_rewards([values for values, _ in found])}
        row["completion_tokens"] = float(np.mean([length for _, length in found]))
        jsonl.append(self._path, [row])
        return row

    def _prompts(self, numbers: Sequence[int]) -> list[Prompt]:
        found, source = [], self._encoder.sources[0]
        for n in numbers:
            result = self._encoder(Questions(0, (n,)))[0]
            if isinstance(result, RecordError):
                log.warning("held-out record %s cannot be used: %s", result.key, result.message)
            else:
                found.append(Prompt(n, result, as_prompt(source[n])))
        return found


def mean_rewards(rewards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means over completions: "reward", which is the total, and "reward/NAME" of every component."""
    names = dict.fromkeys(name for values in rewards for name in values)
    means = {name: float(np.mean([values[name] for values in rewards])) for name in names}
    return {"reward": means.pop("total"), **{f"reward/{name}": mean for name, mean in means.items()}}
