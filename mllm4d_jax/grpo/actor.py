"""Draws completions for prompts and scores them; the texts of one part are scored while the device draws the next."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.generate.completions import Completions
from mllm4d_jax.generate.policy import SamplingOptions, prompt_id
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.grpo.learner import PromptFeatures
from mllm4d_jax.grpo.prompts import Prompt, PromptStep
from mllm4d_jax.grpo.rollout import Rollouts
from mllm4d_jax.parallel import multihost
from mllm4d_jax.qa.custom_rewards import Rewards
from mllm4d_jax.qa.reasoning import with_prompt
from mllm4d_jax.rows.completion_rows import PromptBatch, collate_prompts, needed_prompt_sizes
from mllm4d_jax.rows.rows import RowSizes
from mllm4d_jax.rows.shape import RowShape

# (trees of the policy, vision inputs of so many prompts, their number)
Encode = Callable[[tuple, Any, int], PromptFeatures | None]
Scores = list[tuple[str, Mapping[str, float]]]  # (text, rewards) of every completion


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Rollouts with the prompts they are for.

    Attributes:
      prompts: those of this process.
      batch: of them, on the host.
      features: of them, on the devices; None for prompts without media.
      rollouts: the completions, of all processes once they are shared.
    """

    prompts: tuple[Prompt, ...]
    batch: PromptBatch
    features: PromptFeatures | None
    rollouts: Rollouts


@dataclasses.dataclass(eq=False)
class Actor:
    """Samples and scores on the devices of one process. Use as a context manager.

    Attributes:
      encode: vision features of prompts, see `Learner.encode`.
      branches: completions of each prompt, G.
      max_new_tokens: length cap.
      prompts_at_once: prompts in the sampler at a time; 0 = all. Bounds the memory of the caches.
      seed: of the whole run; each step draws from a seed of its own.
      together: all processes prepare as many prompts at the same time, and pad them alike.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    shape: RowShape
    encode: Encode
    rewards: Rewards
    options: SamplingOptions
    branches: int
    max_new_tokens: int
    prompts_at_once: int
    seed: int
    together: bool = True

    @functools.cached_property
    def _scorer(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(1, "scorer")

    def greedy(self) -> Actor:
        """Return an actor with the same sampler that gives one greedy completion per prompt, each process by itself."""
        options = dataclasses.replace(self.options, temperature=0.0, require_exact=False)
        return dataclasses.replace(self, options=options, branches=1, prompts_at_once=0, together=False)

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._scorer.shutdown(cancel_futures=True)

    def draw(self, found: PromptStep, weights: tuple, step: int, policy_step: int, waited: float = 0.0) -> Drawn:
        """Completions of a step's prompts.

        What is drawn depends on the run's seed, the step, and each prompt's key and position; not on its neighbours.

        Args:
          weights: trees of the policy, as `Sampler.generate` takes them.
          step: the step they are for; policy_step: optimiser steps done by the policy.
          waited: seconds that the data took.

        Raises:
          RewardError: a reward function misbehaves.
        """
        started = time.perf_counter()
        prompts, scores = found.prompts, []
        batch, features = self.prepare(prompts, weights)
        jax.block_until_ready(features)
        encoded = time.perf_counter()
        size = self.prompts_at_once or len(prompts)
        parts: list[tuple[slice, Completions]] = []
        for at in range(0, len(prompts), size):
            chosen = slice(at, at + size)
            out = self._sample(prompts[chosen], _rows(batch, chosen), _features(features, chosen), weights, step)
            parts.append((chosen, out))
            scores.append(self._scorer.submit(self._score, prompts[chosen], out))
        sampled = time.perf_counter()
        drawn = [
            _rollouts(found, chosen, out, scored.result(), (step, policy_step))
            for (chosen, out), scored in zip(parts, scores, strict=True)
        ]
        rollouts = Rollouts.join(drawn, self.options.pad_id)
        prefill = rollouts.seconds["prefill"]
        seconds = {
            "data": waited,
            "vision": encoded - started,
            "prefill": prefill,
            "decode": sampled - encoded - prefill,
            "score": time.perf_counter() - sampled,
        }
        return Drawn(prompts, batch, features, dataclasses.replace(rollouts, seconds=seconds))

    def prepare(self, prompts: Sequence[Prompt], weights: tuple) -> tuple[PromptBatch, PromptFeatures | None]:
        """The prompts as arrays, their vision features on the devices; frames are not kept. `weights`: as of `draw`."""
        examples = [p.example for p in prompts]
        needed = needed_prompt_sizes(examples)
        if self.together:
            needed = RowSizes(*multihost.gather(dataclasses.astuple(needed)).max(axis=0).tolist())
        sizes = self.shape.sizes(needed)
        batch = collate_prompts(examples, sizes, self.shape.geometry, self.shape.visual_token_ids)
        features = self.encode(weights, batch.inputs.vision, len(prompts))
        return dataclasses.replace(batch, inputs=batch.inputs._replace(vision=None)), features

    def _sample(
        self, prompts: Sequence[Prompt], batch: PromptBatch, features: PromptFeatures | None, weights: tuple, step: int
    ) -> Completions:
        return self.sampler.generate(
            weights,
            batch.inputs,
            prompt_ids=[prompt_id(f"{p.key}@{p.position}") for p in prompts],
            branches=self.branches,
            max_new_tokens=self.max_new_tokens,
            options=self.options,
            seed=step_seed(self.seed, step),
            features=None if features is None else features.flat(),
            detokenize=self.tokenizer.decode,
        )

    def _score(self, prompts: Sequence[Prompt], out: Completions) -> Scores:
        return [
            (text, self.rewards(text, prompt.record.solution, prompt.described()))
            for prompt, drawn in zip(prompts, out.texts(self.tokenizer.decode), strict=True)
            for text in (with_prompt(prompt.example.text, generated) for generated in drawn)
        ]


def step_seed(seed: int, step: int) -> int:
    """The sampler's seed of a step, in [0, 2^32)."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def _rows(batch: PromptBatch, chosen: slice) -> PromptBatch:
    """Some of the prompts; their features are numbered from 0 again."""
    inputs = batch.inputs
    index = inputs.vision_index[chosen]
    return dataclasses.replace(
        batch,
        lengths=batch.lengths[chosen],
        next_position=batch.next_position[chosen],
        inputs=inputs._replace(
            tokens=inputs.tokens[chosen],
            positions=inputs.positions[:, chosen],
            segment_ids=inputs.segment_ids[chosen],
            vision_index=np.where(index >= 0, index - chosen.start * batch.features, -1),
        ),
    )


def _features(features: PromptFeatures | None, chosen: slice) -> PromptFeatures | None:
    if features is None or (chosen.start == 0 and chosen.stop >= features.merged.shape[0]):
        return features
    return PromptFeatures(features.merged[chosen], features.deepstack[:, chosen])


def _rollouts(found: PromptStep, chosen: slice, out: Completions, scored: Scores, steps: tuple[int, int]) -> Rollouts:
    """Of some prompts of a step, cut to the longest completion; `steps`: the step, and that of the policy."""
    lengths, cost = out.lengths.reshape(-1), out.statistics
    longest, (texts, rewards) = int(lengths.max()), zip(*scored, strict=True)
    return Rollouts(
        step=steps[0],
        policy_step=steps[1],
        positions=tuple(p.position for p in found.prompts[chosen]),
        position=found.position,
        rejected=found.rejected,
        tokens=out.tokens[..., :longest].reshape(-1, longest),
        lengths=lengths,
        logprobs=out.logprobs[..., :longest].reshape(-1, longest),
        finish=tuple(reason for row in out.finish_reason for reason in row),
        texts=texts,
        rewards=rewards,
        seconds={"prefill": cost.prefill_seconds},
        counts={
            "decode_steps": cost.steps,
            "branch_steps": cost.branch_steps,
            "wasted_branch_steps": cost.wasted_branch_steps,
        },
    )
