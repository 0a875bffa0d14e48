"""A run of reinforcement learning put together, with prompts, actors and learner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.stream import GroupStream, LoaderOptions
from mllm4d_jax.files.remote import remove_folder
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.generate.stream import Limits
from mllm4d_jax.generate.weights import SamplingWeights, sampling_mesh
from mllm4d_jax.grpo import settings
from mllm4d_jax.grpo.actor import Actor
from mllm4d_jax.grpo.held_out import HeldOut
from mllm4d_jax.grpo.learner import Learner, PromptEncoder
from mllm4d_jax.grpo.prompts import PromptLoader
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.mesh import own_part
from mllm4d_jax.parallel.rules import batch_shards
from mllm4d_jax.qa.records import as_prompt, as_scored_prompt
from mllm4d_jax.report.reading import EVALS
from mllm4d_jax.run.begin import Begun, begin
from mllm4d_jax.run.build import Parts, open_held_out
from mllm4d_jax.run.checkpoint import Checkpoints
from mllm4d_jax.run.fitting import remat_forms
from mllm4d_jax.run.preflight import PreflightError
from mllm4d_jax.run.start import start_from_run


@dataclasses.dataclass
class PolicyState:
    """What a step changes: the trees of the policy and of its optimiser, on the devices."""

    trainable: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class GrpoSetup:
    """A run ready to train.

    Attributes:
      begun: what every task has.
      loader: of prompts.
      actor: of the steps; `greedy`: of held-out prompts.
      learner, weights: see their modules.
      held_out: None without held-out prompts.
      reference: tree of the policy at the start; None without a KL term.
      state: of the policy.
    """

    begun: Begun
    loader: PromptLoader
    actor: Actor
    greedy: Actor
    learner: Learner
    weights: SamplingWeights
    held_out: HeldOut | None
    reference: Any
    state: PolicyState

    def sampling_weights(self) -> tuple:
        """Return the trees of the policy as it is now, for the sampler."""
        return self.weights.of(self.state.trainable)

    def owed(self) -> bool:
        """Return whether the evaluation after the steps that were done at the start is missing; on every process."""
        if self.held_out is None:
            return False
        step, c = self.begun.progress.step, self.begun.config
        return (step % c.eval.every == 0 or step == c.train.steps) and not self.held_out.done(step)

    @property
    def facts(self) -> Mapping[str, str]:
        """For the report."""
        config = self.begun.config
        return self.begun.facts() | {
            "completions of a step": f"{config.rollout.prompts} prompts x {config.rollout.completions}",
            "objective": f"{config.objective.preset}: {self.learner.objective}",
            "rewards": ", ".join(config.reward.functions),
            "sampling on": f"mesh {dict(self.weights.mesh.shape)}",
        }


def set_up(config: ml_collections.ConfigDict, workdir: Path, checkpoints: Checkpoints) -> GrpoSetup:
    """Load everything a run needs and restore the newest checkpoint. Raises as `task.run`."""
    begun = begin(config, workdir, checkpoints)
    parts, encoder, progress = begun.parts, begun.encoder, begun.progress
    trainable, opt_state = _start(begun), parts.opt_state
    reference = jax.tree.map(lambda x: x.copy(), trainable) if settings.objective_of(config).beta > 0 else None
    if progress.step:
        trainable, opt_state = checkpoints.restore(progress.step, trainable, opt_state)
    sampling = settings.sampling_of(config, encoder.tokenizer, parts.sizes.text.vocab_size)
    learner = make_learner(parts, trainable, opt_state, sampling)
    weights = sampling_weights(parts, trainable)
    state = PolicyState(trainable, opt_state)
    actor = _actor(begun, weights, sampling, learner, state)
    greedy, held_out, c, number = actor.greedy(), None, config.eval, config.rollout.prompts
    judged = as_prompt if settings.rewards_of(config).builtin is None else as_scored_prompt
    if c.path:
        held_encoder = GroupEncoder([open_held_out(config, c.path, c.root)], encoder, as_prompt=judged)
        held_out = HeldOut(
            workdir / EVALS,
            held_encoder,
            greedy,
            limit=c.limit,
            at_once=number,
            workers=config.data.workers,
        )
    options = LoaderOptions(
        batch_size=number,
        workers=config.data.workers,
        seed=config.seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    prompts = GroupEncoder(begun.mixture.sources, encoder, as_prompt=judged)
    stream = GroupStream(begun.mixture, prompts, begun.open_quarantine(), options, progress.position)
    loader = PromptLoader(stream, number)
    return GrpoSetup(begun, loader, actor, greedy, learner, weights, held_out, reference, state)


def make_learner(parts: Parts, trainable: Any, opt_state: Any, sampling: SamplingOptions) -> Learner:
    """Return the learner of completions drawn like `sampling`; trees of arrays, or shapes. Raises PreflightError."""
    if "vision" in trainable:  # each clip is encoded once for all its uses, outside the gradient
        raise PreflightError("train.trainable names parameters of the vision tower, which is frozen here")
    return Learner(
        parts.graphdef,
        parts.optimizer,
        trainable,
        opt_state,
        settings.objective_of(parts.config),
        temperature=sampling.temperature,
        banned_ids=sampling.banned_ids,
        mesh=parts.mesh,
        chunk=parts.config.train.loss_chunk,
        remat=remat_forms(parts.config.model.remat, parts.mesh.devices.flat[0].platform),
    )


def sampling_weights(parts: Parts, trainable: Any, own: Callable[[Mesh], Mesh] = own_part) -> SamplingWeights:
    """Return the weights as the sampler takes them, on its mesh; `own`: gives this process's part of it."""
    config = parts.config
    mesh = sampling_mesh(parts.mesh, config.rollout.tensor)
    return SamplingWeights(
        parts.graphdef,
        trainable,
        parts.frozen,
        mesh,
        own=own(mesh),
        learner_mesh=parts.mesh,
        patterns=tuple(config.train.trainable),
        attention=config.model.attention,
    )


def make_sampler(config: ml_collections.ConfigDict, weights: SamplingWeights) -> Sampler:
    """Return the sampler on its mesh."""
    ladder = make_ladder(config, batch_shards(weights.mesh))
    return Sampler(weights.graphdef, weights.mesh, chunk=config.rollout.chunk, ladder=ladder)


def make_ladder(config: ml_collections.ConfigDict, shards: int) -> Ladder:
    """Return the sizes of the sampler's arrays, whose rows are split over so many devices."""
    return Ladder(ratio=config.rollout.ladder_ratio, shards=shards)


def _start(begun: Begun) -> Any:
    """The trained tree at step 0, which is what the reference is, too.

    It is kept beside the checkpoints, since the run that `model.adapter` names may go on or be deleted.
    """
    folder, trainable = begun.checkpoints.folder.parent / "start", begun.parts.trainable
    if begun.progress.step:
        with Checkpoints(folder, keep=1, read_only=True) as kept:
            return kept.restore_trainable(0, trainable)
    trainable = start_from_run(begun.config, trainable, begun.content)
    multihost.primary_only(lambda: remove_folder(folder))
    with Checkpoints(folder, keep=1) as kept:
        kept.save_trainable(0, trainable)
    return trainable


def _actor(
    begun: Begun, weights: SamplingWeights, sampling: SamplingOptions, learner: Learner, state: PolicyState
) -> Actor:
    """The actor of the steps."""

    def encode(trees: tuple, vision: Any, prompts: int) -> Any:
        return learner.encode(state.trainable, begun.parts.frozen, vision, prompts)

    c, hosts = begun.config.rollout, jax.process_count()
    return Actor(
        make_sampler(begun.config, weights),
        begun.encoder.tokenizer,
        begun.parts.shape,
        encode if hosts == 1 else PromptEncoder(weights.graphdef, weights.mesh),
        settings.rewards_of(begun.config),
        sampling,
        branches=c.completions,
        max_new_tokens=c.max_new_tokens,
        at_once=Limits(-(-c.prompts_at_once // hosts), c.completions_at_once),
        seed=begun.config.seed,
    )
