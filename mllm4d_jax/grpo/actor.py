"""Draws completions for prompts and scores them; the texts of one part are scored while the device draws the next."""

from __future__ import annotations

import concurrent.futures
import dataclasses
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
from mllm4d_jax.qa.custom_rewards import Rewards
from mllm4d_jax.rows.completion_rows import PromptBatch, collate_prompts, needed_prompt_sizes
from mllm4d_jax.rows.shape import RowShape

Encode = Callable[[Any, int], PromptFeatures | None]  # (vision inputs of so many prompts, their number)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Rollouts with the prompts they are for.

    Attributes:
      prompts: B.
      batch: on the host.
      features: on the devices; None for prompts without media.
      rollouts: the completions.
    """

    prompts: tuple[Prompt, ...]
    batch: PromptBatch
    features: PromptFeatures | None
    rollouts: Rollouts


class Actor:
    """Samples and scores. Use as a context manager."""

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: Tokenizer,
        shape: RowShape,
        encode: Encode,
        rewards: Rewards,
        options: SamplingOptions,
        *,
        branches: int,
        max_new_tokens: int,
        prompts_at_once: int = 0,
        seed: int = 0,
    ) -> None:
        """
        Args:
          encode: vision features of prompts, see `Learner.encode`.
          branches: completions of each prompt, G.
          max_new_tokens: length cap.
          prompts_at_once: prompts in the sampler at a time; 0 = all. Bounds the memory of the caches.
          seed: of the whole run; each step draws from a seed of its own.
        """
        self._sampler, self._tokenizer, self.shape, self._encode = sampler, tokenizer, shape, encode
        self._rewards, self.options, self._branches = rewards, options, branches
        self._longest, self._at_once, self._seed = max_new_tokens, prompts_at_once, seed
        self._scorer = concurrent.futures.ThreadPoolExecutor(1, "scorer")

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
        prompts, rewards = found.prompts, []
        batch, features = self.prepare(prompts)
        jax.block_until_ready(features)
        encoded = time.perf_counter()
        size = self._at_once or len(prompts)
        parts: list[Completions] = []
        for at in range(0, len(prompts), size):
            chosen = slice(at, at + size)
            out = self._sample(prompts[chosen], _rows(batch, chosen), _features(features, chosen), weights, step)
            parts.append(out)
            rewards.append(self._scorer.submit(self._score, prompts[chosen], out))
        sampled = time.perf_counter()
        scored = [(text, values) for future in rewards for text, values in future.result()]
        prefill = sum(part.statistics.prefill_seconds for part in parts)
        seconds = {
            "data": waited,
            "vision": encoded - started,
            "prefill": prefill,
            "decode": sampled - encoded - prefill,
            "score": time.perf_counter() - sampled,
        }
        tokens, lengths, logprobs = _joined(parts, self.options.pad_id)
        rollouts = Rollouts(
            step=step,
            policy_step=policy_step,
            positions=tuple(p.position for p in prompts),
            position=found.position,
            rejected=found.rejected,
            tokens=tokens,
            lengths=lengths,
            logprobs=logprobs,
            finish=tuple(reason for part in parts for row in part.finish_reason for reason in row),
            texts=tuple(text for text, _ in scored),
            rewards=tuple(values for _, values in scored),
            seconds=seconds,
            counts=_counts(parts),
        )
        return Drawn(prompts, batch, features, rollouts)

    def prepare(self, prompts: Sequence[Prompt]) -> tuple[PromptBatch, PromptFeatures | None]:
        """The prompts as arrays, their vision features on the devices; the frames are not kept."""
        examples = [p.example for p in prompts]
        sizes = self.shape.sizes(needed_prompt_sizes(examples))
        batch = collate_prompts(examples, sizes, self.shape.geometry, self.shape.visual_token_ids)
        features = self._encode(batch.inputs.vision, len(prompts))
        return dataclasses.replace(batch, inputs=batch.inputs._replace(vision=None)), features

    def _sample(
        self,
        prompts: Sequence[Prompt],
        batch: PromptBatch,
        features: PromptFeatures | None,
        weights: tuple,
        step: int,
    ) -> Completions:
        return self._sampler.generate(
            weights,
            batch.inputs,
            prompt_ids=[prompt_id(f"{p.key}@{p.position}") for p in prompts],
            branches=self._branches,
            max_new_tokens=self._longest,
            options=self.options,
            seed=step_seed(self._seed, step),
            features=None if features is None else features.flat(),
            detokenize=self._tokenizer.decode,
        )

    def _score(self, prompts: Sequence[Prompt], out: Completions) -> list[tuple[str, Mapping[str, float]]]:
        """(text, rewards) of every completion."""
        return [
            (text, self._rewards(text, prompt.record.solution, prompt.described()))
            for prompt, texts in zip(prompts, out.texts(self._tokenizer.decode), strict=True)
            for text in texts
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


def _joined(parts: Sequence[Completions], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens i32[C, T], lengths i32[C], log-probs f32[C, T]), cut to the longest completion."""
    longest = max(int(part.lengths.max()) for part in parts)

    def rows(name: str, value: float) -> np.ndarray:
        found = (getattr(part, name)[..., :longest] for part in parts)
        wide = (np.pad(x, ((0, 0), (0, 0), (0, longest - x.shape[-1])), constant_values=value) for x in found)
        return np.concatenate([x.reshape(-1, longest) for x in wide])

    lengths = np.concatenate([part.lengths.reshape(-1) for part in parts])
    return rows("tokens", pad_id), lengths, rows("logprobs", 0.0)


def _counts(parts: Sequence[Completions]) -> dict[str, float]:
    found = [part.statistics for part in parts]
    return {
        "decode_steps": sum(s.steps for s in found),
        "branch_steps": sum(s.branch_steps for s in found),
        "wasted_branch_steps": sum(s.wasted_branch_steps for s in found),
    }
