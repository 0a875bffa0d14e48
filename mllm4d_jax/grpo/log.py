"""What a run of reinforcement learning writes down: metrics of its steps, and completions that people can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm4d_jax.grpo.held_out import mean_rewards
from mllm4d_jax.grpo.prompts import Prompt
from mllm4d_jax.grpo.rollout import Rollouts
from mllm4d_jax.qa.reasoning import parse
from mllm4d_jax.run.log import Row, keep_until

_RATES = ("rollouts_per_s", "tokens_per_s")
_NOT_AVERAGED = ("step", "position", "quarantined", "compiles", "memory_gib", "lr")


def step_row(rollouts: Rollouts, step_s: float, **values: float | None) -> dict[str, float | None]:
    """The row of one step for metrics.jsonl.

    Args:
      rollouts: of the step.
      step_s: seconds of the whole step.
      values: further columns.
    """
    names = list(rollouts.rewards[0])
    spread = {f"reward_std/{n}": float(np.std([r[n] for r in rollouts.rewards])) for n in names}
    tokens = int(rollouts.lengths.sum())
    return {
        "step": rollouts.step + 1,
        **mean_rewards(rollouts.rewards),
        **spread,
        "completion_tokens": tokens / len(rollouts.lengths),
        "completion_tokens_max": int(rollouts.lengths.max()),
        "staleness": rollouts.step - rollouts.policy_step,
        "step_s": step_s,
        **{f"time/{name}": seconds for name, seconds in rollouts.seconds.items()},
        **rollouts.counts,
        "rollouts_per_s": len(rollouts.lengths) / step_s,
        "tokens_per_s": tokens / step_s,
        "position": rollouts.position,
        "quarantined": rollouts.rejected,
        **values,
    }


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Means over consecutive steps; the last value of what only goes up. What is not known (None) is left out."""
    out = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        known = [row[name] for row in rows if row.get(name) is not None]
        if known:
            out[name] = float(known[-1] if name in _NOT_AVERAGED else np.mean(known))
    return out


def line(values: Mapping[str, float]) -> str:
    """What the progress bar says."""
    parts = [f"reward {values['reward']:.3f}"]
    parts += [f"{name} {values[f'reward/{name}']:.2f}" for name in ("accuracy",) if f"reward/{name}" in values]
    parts += [f"KL {values['kl']:.3f}"] if "kl" in values else []
    parts += [f"{values['completion_tokens']:.0f} tokens", f"dead {values['dead_groups']:.0%}"]
    parts += [f"{values['rollouts_per_s']:.1f} rollouts/s"]
    return ", ".join(parts)


class CompletionLog:
    """completions.jsonl. Use as a context manager."""

    def __init__(self, path: Path, start: int, every: int) -> None:
        """
        Args:
          path: the file.
          start: steps done; what an interrupted run wrote beyond them is removed.
          every: steps between those that are written; 0 = none.
        """
        self._every = every
        keep_until(path, start)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> CompletionLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, prompts: Sequence[Prompt], rollouts: Rollouts, advantages: np.ndarray) -> None:
        """Writes the completions of a step.

        Args:
          advantages: f32[C].
        """
        if not self._every or rollouts.step % self._every:
            return
        for i, text in enumerate(rollouts.texts):
            prompt, branch = divmod(i, rollouts.branches)
            row = completion_row(prompts[prompt], text, rollouts.rewards[i])
            row |= {"step": rollouts.step + 1, "branch": branch, "finish": rollouts.finish[i]}
            row |= {"tokens": int(rollouts.lengths[i]), "advantage": float(advantages[i])}
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def completion_row(prompt: Prompt, text: str, rewards: Mapping[str, float]) -> dict[str, Any]:
    """One completion with what it was asked, what it says and how it was judged."""
    parsed = parse(text)
    solution = prompt.record.solution
    return {
        "key": prompt.key,
        "question": prompt.question,
        "media": list(prompt.media),
        "completion": text,
        "rewards": dict(rewards),
        "total": rewards["total"],
        "answer": parsed.answer or None,
        "solution": solution[0] if isinstance(solution, list) and len(solution) == 1 else solution,
        "camera": [None if c is None else list(c) for c in parsed.camera_centers],
        "object": [None if c is None else list(c) for c in parsed.object_centers],
    }
