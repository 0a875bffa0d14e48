"""Our side of grpo_vs_hf.py: the actor and the learner of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks.grpo_work import LOOKS, PHASES, Handed, Numbers, Sample, TimedUpdate
from mllm4d_jax.grpo import settings
from mllm4d_jax.grpo.actor import Drawn
from mllm4d_jax.grpo.prompts import PromptStep
from mllm4d_jax.grpo.setup import GrpoSetup, set_up
from mllm4d_jax.grpo.task import rows_of
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.flops import Tuning, real_work, step_flops
from mllm4d_jax.rows.completion_rows import CompletionRows
from mllm4d_jax.run.checkpoint import Checkpoints


class Ours:
    """The actor and the learner of a run."""

    def __init__(self, config: ml_collections.ConfigDict, setup: GrpoSetup) -> None:
        self._config, self._setup = config, setup
        # Without an end token every completion is as long as the cap, on both sides.
        setup.actor.options = dataclasses.replace(setup.actor.options, eos_ids=())
        self.encoder = setup.begun.encoder
        self._steps = 0

    @property
    def adapter(self) -> Mapping[str, np.ndarray]:
        """The trained parameters on the host by "projection/lora_a", layers first."""
        leaves = jax.tree_util.tree_leaves_with_path(self._setup.state.trainable)
        return {"/".join(key.key for key in path[-2:]): np.array(x) for path, x in leaves}

    def prompts(self) -> PromptStep:
        """Prompts of the next step."""
        return self._setup.loader.next_step()

    def draw(self, found: PromptStep) -> Drawn:
        """Completions of the prompts by the policy as it is."""
        self._steps += 1
        return self._setup.actor.draw(found, self._setup.sampling_weights(), self._steps, self._steps)

    def reference(self, drawn: Drawn) -> tuple[Any, list[CompletionRows], np.ndarray]:
        """(the batch with the reference's log-probs, its rows, these log-probs)."""
        setup = self._setup
        length, parts = rows_of(self._config, setup.actor.shape, drawn)
        batch = drawn.rollouts.batch(length)
        scored = np.asarray(
            setup.learner.score(setup.reference, setup.begun.parts.frozen, drawn.features, parts, batch)
        )
        return batch._replace(reference_logprobs=scored), parts, scored

    def update(self, drawn: Drawn, batch: Any, parts: list[CompletionRows]) -> tuple[float, float]:
        """One optimiser step: (loss, gradient norm) before it."""
        setup, state = self._setup, self._setup.state
        state.trainable, state.opt_state, update = setup.learner.update(
            state.trainable, state.opt_state, setup.begun.parts.frozen, drawn.features, parts, batch
        )
        jax.block_until_ready(state.trainable)
        return float(update.step.loss), float(update.step.grad_norm)

    def numbers(self, drawn: Drawn) -> Numbers:
        """Log-probs, loss and gradient norm of the policy as it is, which then makes an optimiser step."""
        setup, (batch, parts, reference) = self._setup, self.reference(drawn)
        policy = setup.learner.score(setup.state.trainable, setup.begun.parts.frozen, drawn.features, parts, batch)
        return Numbers(np.asarray(policy), reference, *self.update(drawn, batch, parts))

    def look(self, drawn: Drawn) -> Handed:
        """Learn from the same completions twice; what theirs has to find, too."""
        r = drawn.rollouts
        sample = Sample(tuple(prompt.key for prompt in drawn.prompts), r.tokens, r.logprobs, r.totals)
        return Handed(sample, tuple((self.adapter, self.numbers(drawn)) for _ in LOOKS))

    def step(self, found: PromptStep) -> TimedUpdate:
        """Draws, scores, updates."""
        started, used = time.perf_counter(), time.process_time()
        drawn = self.draw(found)
        sampled = time.perf_counter()
        batch, parts, _ = self.reference(drawn)
        scored = time.perf_counter()
        self.update(drawn, batch, parts)
        ended = time.perf_counter()
        phases = {name: drawn.rollouts.seconds[name] for name in PHASES[:4]}
        phases |= {"reference": scored - sampled, "update": ended - scored}
        return TimedUpdate(phases, ended - started, time.process_time() - used)

    def facts(self, drawn: Drawn) -> tuple[dict[str, int], float]:
        """(numbers of tokens, FLOPs that the model needs for the update: the pass of the reference not included)."""
        c, (_, parts) = self._config, rows_of(self._config, self._setup.actor.shape, drawn)
        model = ModelConfig.from_dict(json.loads((Path(c.model.path) / "config.json").read_text(encoding="utf-8")))
        tuning = Tuning(rank=c.lora.rank, targets=tuple(c.lora.targets))
        flops = sum(
            step_flops(
                model, real_work(rows.inputs, int((rows.places < rows.loss_index.shape[1]).sum())), tuning
            ).total.model
            for rows in parts
        )
        prompt = int(drawn.batch.lengths.max())
        counts = {
            "prompt": prompt,
            "visual": int((drawn.batch.inputs.vision_index[0] >= 0).sum()),
            "ours": sum(rows.inputs.tokens.size for rows in parts),
            "theirs": len(drawn.rollouts.lengths) * (prompt + drawn.rollouts.tokens.shape[1]),
        }
        return counts, flops


@contextlib.contextmanager
def open_ours(config: ml_collections.ConfigDict, folder: Path) -> Iterator[Ours]:
    """A run at its start, with its workdir in `folder`."""
    settings.check(config)
    with Checkpoints(folder / "checkpoints", config.train.keep_checkpoints) as checkpoints:
        setup = set_up(config, folder, checkpoints)
        with setup.begun.encoder, setup.loader, setup.actor, setup.greedy:
            yield Ours(config, setup)
