"""Rewards on held-out prompts, sampled greedily and always in the same order."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.kept import KeptGroups
from mllm4d_jax.data.quarantine import counted
from mllm4d_jax.data.sources import Questions
from mllm4d_jax.files import jsonl
from mllm4d_jax.grpo.actor import Actor
from mllm4d_jax.grpo.prompts import PromptStep, prompts_of
from mllm4d_jax.parallel import multihost
from mllm4d_jax.qa.errors import RecordError

log = logging.getLogger(__name__)


class HeldOut:
    """The held-out prompts of a run and the file of its evaluations, `evals.jsonl`."""

    def __init__(
        self, path: Path, encoder: GroupEncoder, actor: Actor, *, limit: int, at_once: int, workers: int
    ) -> None:
        """
        Args:
          path: the file.
          encoder: of one source, one that makes prompts.
          actor: one completion per prompt, with the rewards of the run; of each process by itself.
          limit: prompts; at_once: prompts of a batch; both over all processes.
          workers: processes that encode; 0 = a thread of this process.
        """
        host, hosts = jax.process_index(), jax.process_count()
        self._path, self._actor, self._name = path, actor, encoder.sources[0].name
        self._at_once = -(-at_once // hosts)
        groups = [Questions(0, (n,), n) for n in range(min(limit, len(encoder.sources[0])))]
        self._groups = KeptGroups(groups[host::hosts], encoder, workers=workers, ahead=self._at_once)

    def done(self, step: int) -> bool:
        """Whether the evaluation after so many steps is in the file, as the first process reads it."""
        there = multihost.primary_only(lambda: any(row.get("step") == step for row in jsonl.read_steps(self._path)))
        return bool(multihost.gather([bool(there)])[0, 0])

    def run(
        self, weights: tuple, step: int, progress: Callable[[], None] = lambda: None, stop: Any = False
    ) -> dict[str, Any] | None:
        """Evaluates the policy after `step` steps and adds a row to the file: means of all rewards.

        Every process evaluates its own prompts, at its own pace, and all of them call this.

        Args:
          weights: see `Actor.draw`.
          progress: called after each batch.
          stop: true once this process was asked to stop. Then it asks no more, and there is no row (None).

        Raises:
          RecordError: not one of the prompts can be used.
          OtherProcessError: another process cannot go on.
        """
        mine = multihost.together(lambda: self._ask(weights, step, progress, stop))
        parts = [json.loads(part) for part in multihost.gather_bytes(json.dumps(mine).encode())]
        if None in parts:
            return None
        told = [one for part in parts for one in part["found"]]
        found = [(rewards, length) for _, rewards, length in sorted(told, key=lambda one: one[0])]
        bad = [reason for part in parts for reason in part["bad"]]
        if not found:
            raise RecordError(f"not one of the held-out prompts can be used: {counted(bad)}", "no_prompt", self._name)
        row = {"step": step, "n": len(found), "unusable": len(bad), **mean_rewards([values for values, _ in found])}
        row["completion_tokens"] = float(np.mean([length for _, length in found]))
        if multihost.is_primary():
            jsonl.append(self._path, [row])
        return row

    def _ask(self, weights: tuple, step: int, progress: Callable[[], None], stop: Any) -> dict[str, list] | None:
        """This process's prompts: (place, rewards, tokens) of each, and why others cannot be used; None if stopped."""
        found: list[tuple[int, Mapping[str, float], int]] = []
        bad, number = [], len(self._groups.groups)
        with contextlib.closing(iter(self._groups)) as encoded:
            quiet = not multihost.is_primary()
            for _ in tqdm(range(0, number, self._at_once), "held-out", unit="batch", leave=False, disable=quiet):
                if stop:
                    return None
                batch = list(itertools.islice(encoded, self._at_once))
                prompts = [prompt for group in batch for prompt in prompts_of(group)]
                for error in (error for group in batch for error in group.errors.values()):
                    log.warning("held-out record %s cannot be used: %s", error.key, error.message)
                    bad.append(error.reason)
                if not prompts:
                    continue
                full = prompts + prompts[:1] * (self._at_once - len(prompts))  # one shape for every batch
                rollouts = self._actor.draw(PromptStep(tuple(full), 0, 0), weights, 0, step).rollouts
                places, rewards = (p.position for p in full), rollouts.rewards
                found += list(zip(places, rewards, rollouts.lengths.tolist(), strict=True))[: len(prompts)]
                progress()
        return {"found": found, "bad": bad}


def mean_rewards(rewards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means over completions: "reward", which is the total, and "reward/NAME" of every component."""
    names = dict.fromkeys(name for values in rewards for name in values)
    means = {name: float(np.mean([values[name] for values in rewards])) for name in names}
    return {"reward": means.pop("total"), **{f"reward/{name}": mean for name, mean in means.items()}}
