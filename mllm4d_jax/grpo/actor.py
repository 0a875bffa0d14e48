"""Draws completions for prompts and scores them; the texts of a prompt are scored while the device draws others."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.generate.completions import Completions
from mllm4d_jax.generate.inputs import Prompts
from mllm4d_jax.generate.policy import SamplingOptions, prompt_id
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.stream import Limits
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
      at_once: prompts, and branches of each, in the sampler at a time; 0 = all. Bounds the memory of the caches.
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
    at_once: Limits
    seed: int
    together: bool = True

    @functools.cached_property
    def _scorer(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(1, "scorer")

    def greedy(self) -> Actor:
        """Return an actor with the same sampler that gives one greedy completion per prompt, each process by itself."""
        options = dataclasses.replace(self.options, temperature=0.0, require_exact=False)
        return dataclasses.replace(
            self, options=options, branches=1, at_once=Limits(self.at_once.prompts), together=False
        )

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
        started, prompts = time.perf_counter(), found.prompts
        batch, features = self.prepare(prompts, weights)
        jax.block_until_ready(features)
        encoded = time.perf_counter()
        limits = Limits(min(self.at_once.prompts or len(prompts), len(prompts)), self.at_once.branches)
        stream = self.sampler.stream(
            weights,
            self._waiting(prompts, batch, features),
            options=self.options,
            seed=step_seed(self.seed, step),
            limits=limits,
            detokenize=self.tokenizer.decode,
        )
        drawn, scores = {}, {}
        for number, out in stream:
            drawn[number], scores[number] = out, self._scorer.submit(self._score, prompts[number], out)
        sampled, numbers = time.perf_counter(), range(len(prompts))
        scored = [one for number in numbers for one in scores[number].result()]
        completions = Completions.join([drawn[number] for number in numbers], self.options.pad_id)
        prefill = stream.statistics.prefill_seconds
        seconds = {
            "data": waited,
            "vision": encoded - started,
            "prefill": prefill,
            "decode": sampled - encoded - prefill,
            "score": time.perf_counter() - sampled,
        }
        counts = {
            "decode_steps": stream.statistics.steps,
            "branch_steps": stream.statistics.branch_steps,
            "wasted_branch_steps": stream.statistics.wasted_branch_steps,
        }
        rollouts = _rollouts(found, completions, scored, (step, policy_step), seconds, counts)
        return Drawn(prompts, batch, features, rollouts)

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

    def _waiting(
        self, prompts: Sequence[Prompt], batch: PromptBatch, features: PromptFeatures | None
    ) -> Iterator[Prompts]:
        """The prompts as the sampler takes them, each with its own features."""
        size = self.sampler.ladder.shards
        for at in range(0, len(prompts), size):
            chosen = slice(at, at + size)
            some = _features(features, chosen)
            yield Prompts.checked(
                _rows(batch, chosen).inputs,
                [prompt_id(f"{p.key}@{p.position}") for p in prompts[chosen]],
                self.branches,
                self.max_new_tokens,
                None if some is None else some.flat(),
            )

    def _score(self, prompt: Prompt, out: Completions) -> Scores:
        texts = (with_prompt(prompt.example.text, generated) for generated in out.texts(self.tokenizer.decode)[0])
        return [(text, self.rewards(text, prompt.record.solution, prompt.described())) for text in texts]


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


def _rollouts(
    found: PromptStep,
    out: Completions,
    scored: Scores,
    steps: tuple[int, int],
    seconds: Mapping[str, float],
    counts: Mapping[str, float],
) -> Rollouts:
    """Of the prompts of a step, cut to the longest completion; `steps`: the step, and that of the policy."""
    lengths = out.lengths.reshape(-1)
    longest, (texts, rewards) = int(lengths.max()), zip(*scored, strict=True)
    return Rollouts(
        step=steps[0],
        policy_step=steps[1],
        positions=tuple(p.position for p in found.prompts),
        position=found.position,
        rejected=found.rejected,
        tokens=out.tokens[..., :longest].reshape(-1, longest),
        lengths=lengths,
        logprobs=out.logprobs[..., :longest].reshape(-1, longest),
        finish=tuple(reason for row in out.finish_reason for reason in row),
        texts=texts,
        rewards=rewards,
        seconds=seconds,
        counts=counts,
    )
