"""What a run of reinforcement learning writes down: metrics of its steps, and completions that people can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mllm4d_jax.grpo.held_out import mean_rewards
from mllm4d_jax.grpo.prompts import Prompt
from mllm4d_jax.grpo.rollout import Rollouts
from mllm4d_jax.qa.reasoning import parse

COLUMNS = ("reward", "reward/accuracy", "kl", "completion_tokens", "dead_groups", "rollouts_per_s")  # of the terminal


def step_row(rollouts: Rollouts, step_s: float, **values: float | None) -> dict[str, float | None]:
    """Return the row of one step for metrics.jsonl.

    Args:
      rollouts: of the step.
      step_s: seconds of the whole step.
      values: further columns.
    """
    spread = {f"reward_std/{n}": float(np.std([r[n] for r in rollouts.rewards])) for n in rollouts.rewards[0]}
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


def completion_lines(prompts: Sequence[Prompt], rollouts: Rollouts, advantages: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield the completions of a step as lines of completions.jsonl: what was asked, what it says, how it was judged.

    Args:
      advantages: f32[C].
    """
    for i, (text, rewards) in enumerate(zip(rollouts.texts, rollouts.rewards, strict=True)):
        number, branch = divmod(i, rollouts.branches)
        prompt, parsed = prompts[number], parse(text)
        solution = prompt.record.solution
        yield {
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
            "step": rollouts.step + 1,
            "branch": branch,
            "finish": rollouts.finish[i],
            "tokens": int(rollouts.lengths[i]),
            "advantage": float(advantages[i]),
        }
