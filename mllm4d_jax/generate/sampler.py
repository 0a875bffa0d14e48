"""Sampling G completions of each of B prompts: prefill once, then jitted chunks of decode steps with early exit.

The G completions of a row answer one prompt, or (shared-prefix rows) a question each about what the row begins with.

The model is the learner's own (no second implementation), and log-probs come from the functions that the learner uses
(`policy.py`). Between chunks the host reads the new tokens, ends completions and has others begin in their places
(`stream.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mllm4d_jax.generate.compiled import CompiledPrograms
from mllm4d_jax.generate.completions import Completions, Detokenize, Sampled
from mllm4d_jax.generate.decoding import PromptCache
from mllm4d_jax.generate.inputs import Prompts
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.stream import CompletionStream, Limits
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel.place import place_rows
from mllm4d_jax.rows.batch import ModelInputs


class Sampler(CompiledPrograms):
    """Generates for any number of batches."""

    def prefix(self, weights: tuple, inputs: ModelInputs) -> PromptCache:
        """Runs the common beginning of prompts that are not all known yet, for any number of calls of `generate`.

        Args:
          weights: as in `stream`.
          inputs: plain rows, one for each row of these calls.
        """
        return self.begin(weights, place_rows(inputs, self.mesh))

    def stream(
        self,
        weights: tuple,
        prompts: Iterable[Prompts],
        *,
        options: SamplingOptions,
        seed: int = 0,
        limits: Limits,
        detokenize: Detokenize | None = None,
    ) -> CompletionStream:
        """Completions of one prompt after the other, as they end; where they end others begin.

        Args:
          weights: the trees that `models.split.merge_model` takes.
          prompts: at most as many together as there are devices that rows are split over (`ladder.shards`). They are
            asked for when there is room for them; all are plain rows, or all are shared-prefix rows.
          seed: in [0, 2^32); another one gives other completions.
          limits: how many prompts and branches are on the devices at a time.
          detokenize: needed for `options.stop`.
        """
        return CompletionStream(self, weights, prompts, options, np.uint32(seed), limits, detokenize)

    def generate(
        self,
        weights: tuple,
        inputs: ModelInputs,
        *,
        prompt_ids: Sequence[int] | Sequence[Sequence[int]],
        branches: int,
        max_new_tokens: int | np.ndarray,
        options: SamplingOptions,
        seed: int = 0,
        features: VisionFeatures | None = None,
        prefix: PromptCache | None = None,
        detokenize: Detokenize | None = None,
        limits: Limits | None = None,
    ) -> Sampled:
        """Draws the completions. Each depends on (seed, prompt id, branch number), its prompt and the weights alone.

        Args:
          inputs, prompt_ids, branches, max_new_tokens, features, prefix: see `inputs.Prompts`, which refuses some.
          limits: None for all at a time.
          weights, options, seed, detokenize: see `stream`.
        """
        prompts = Prompts.checked(inputs, prompt_ids, branches, max_new_tokens, features, prefix)
        if inputs.layout is None and inputs.vision is not None and features is None and len(prompts) > 1:
            # Each prompt's prefill is a program of its own, that all frames are for: they are encoded before.
            features = self.encode(weights, place_rows(inputs.vision, self.mesh))
            prompts = Prompts(inputs._replace(vision=None), prompts.call, features)
        stream = self.stream(
            weights,
            prompts.divided(self.ladder.shards),
            options=options,
            seed=seed,
            limits=limits or Limits(len(prompts)),
            detokenize=detokenize,
        )
        found = dict(stream)
        joined = Completions.join([found[n] for n in range(len(prompts))], options.pad_id)
        return Sampled(**vars(joined), statistics=stream.statistics)
