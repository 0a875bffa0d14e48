"""A run of reinforcement learning put together, with prompts, actors and learner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.data.stream import GroupStream, LoaderOptions
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.generate.draw import SamplingOptions
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.generate.weights import SamplingWeights, sampling_mesh
from mllm4d_jax.grpo import settings
from mllm4d_jax.grpo.actor import Actor
from mllm4d_jax.grpo.held_out import HeldOut
from mllm4d_jax.grpo.learner import Learner
from mllm4d_jax.grpo.prompts import PromptLoader
from mllm4d_jax.parallel.rules import batch_shards
from mllm4d_jax.qa.records import as_prompt, as_scored_prompt
from mllm4d_jax.report.reading import CONFIG, EVALS
from mllm4d_jax.run.build import Parts, build, describe_trained, encoder_of, open_held_out, open_records
from mllm4d_jax.run.checkpoint import Checkpoints
from mllm4d_jax.run.digest import content_digests
from mllm4d_jax.run.loop import Progress
from mllm4d_jax.run.start import resume_point, start_from_run


@dataclasses.dataclass
class PolicyState:
    """What a step changes: the trees of the policy and of its optimiser, on the devices."""

    trainable: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class GrpoSetup:
    """A run ready to train.

    Attributes:
      content: digests for `checkpoint.check_resumable`.
      progress: where it begins.
      encoder: its decoder processes have to be closed.
      loader: of prompts.
      actor: of the steps; `greedy`: of held-out prompts.
      learner, weights: see their modules.
      held_out: None without held-out prompts.
      frozen: tree of the base weights; `reference`: tree of the policy at the start, None without a KL term.
      state: of the policy.
      rates: f32[steps].
      facts: for the report.
    """

    content: Mapping[str, str]
    progress: Progress
    encoder: Encoder
    loader: PromptLoader
    actor: Actor
    greedy: Actor
    learner: Learner
    weights: SamplingWeights
    held_out: HeldOut | None
    frozen: Any
    reference: Any
    state: PolicyState
    rates: np.ndarray
    facts: Mapping[str, Any]

    def sampling_weights(self) -> tuple:
        """Return the trees of the policy as it is now, for the sampler."""
        return self.weights.of(self.state.trainable)


def set_up(config: ml_collections.ConfigDict, workdir: Path, checkpoints: Checkpoints) -> GrpoSetup:
    """Load everything a run needs and restore the newest checkpoint. Raises as `task.run`."""
    mixture = open_records(config)
    content = content_digests(config.model.path, mixture)
    progress = resume_point(config, content, checkpoints)
    write_json(workdir / CONFIG, config.to_dict())
    parts, objective = build(config), settings.objective_of(config)
    trainable, opt_state = _start(config, workdir, parts.trainable, content, progress), parts.opt_state
    reference = jax.tree.map(lambda x: x.copy(), trainable) if objective.beta > 0 else None
    if progress.step:
        trainable, opt_state = checkpoints.restore(progress.step, trainable, opt_state)
    encoder = encoder_of(config)
    sampling = settings.sampling_of(config, encoder.tokenizer, parts.sizes.text.vocab_size)
    learner = make_learner(parts, trainable, opt_state, sampling)
    weights = sampling_weights(parts, trainable)
    state = PolicyState(trainable, opt_state)
    actor, greedy = _actors(config, parts, weights, encoder, sampling, learner, state)
    judged = as_prompt if settings.rewards_of(config).builtin is None else as_scored_prompt
    return GrpoSetup(
        content=content,
        progress=progress,
        encoder=encoder,
        loader=_loader(config, workdir, mixture, GroupEncoder(mixture.sources, encoder, as_prompt=judged), progress),
        actor=actor,
        greedy=greedy,
        learner=learner,
        weights=weights,
        held_out=_held_out(config, workdir, encoder, greedy, judged) if config.eval.path else None,
        frozen=parts.frozen,
        reference=reference,
        state=state,
        rates=parts.rates,
        facts=_facts(config, mixture, parts, weights),
    )


def make_learner(parts: Parts, trainable: Any, opt_state: Any, sampling: SamplingOptions) -> Learner:
    """Return the learner of completions that are drawn like `sampling`; trees of arrays, or shapes with shardings."""
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
    )


def sampling_weights(parts: Parts, trainable: Any) -> SamplingWeights:
    """Return the weights as the sampler takes them, on its mesh."""
    config = parts.config
    return SamplingWeights(
        parts.graphdef,
        trainable,
        parts.frozen,
        sampling_mesh(parts.mesh, config.rollout.tensor),
        learner_mesh=parts.mesh,
        patterns=parts.patterns,
        attention=config.model.attention,
    )


def _start(
    config: ml_collections.ConfigDict, workdir: Path, trainable: Any, content: Mapping[str, str], progress: Progress
) -> Any:
    """The trained tree at step 0, which is what the reference is, too.

    It is kept in the workdir, since the run that `model.adapter` names may go on or be deleted.
    """
    with Checkpoints(workdir / "start", keep=1) as kept:
        if progress.step:
            return kept.restore_trainable(0, trainable)
        trainable = start_from_run(config, trainable, content)
        kept.replace_trainable(0, trainable)
    return trainable


def make_sampler(config: ml_collections.ConfigDict, weights: SamplingWeights) -> Sampler:
    """Return the sampler on its mesh."""
    ladder = make_ladder(config, batch_shards(weights.mesh))
    return Sampler(weights.graphdef, weights.mesh, chunk=config.rollout.chunk, ladder=ladder)


def make_ladder(config: ml_collections.ConfigDict, shards: int) -> Ladder:
    """Return the sizes of the sampler's arrays, whose rows are split over so many devices."""
    return Ladder(ratio=config.rollout.ladder_ratio, shards=shards)


def _actors(
    config: ml_collections.ConfigDict,
    parts: Parts,
    weights: SamplingWeights,
    encoder: Encoder,
    sampling: SamplingOptions,
    learner: Learner,
    state: PolicyState,
) -> tuple[Actor, Actor]:
    """The actor of the steps, and one that gives a greedy completion per held-out prompt; they share the sampler."""

    def encode(vision: Any, prompts: int) -> Any:
        return learner.encode(state.trainable, parts.frozen, vision, prompts)

    c = config.rollout
    shared = (make_sampler(config, weights), encoder.tokenizer, parts.shape, encode, settings.rewards_of(config))
    greedy = dataclasses.replace(sampling, temperature=0.0, require_exact=False)
    actor = Actor(
        *shared,
        sampling,
        branches=c.completions,
        prompts_at_once=c.prompts_at_once,
        max_new_tokens=c.max_new_tokens,
        seed=config.seed,
    )
    return actor, Actor(*shared, greedy, branches=1, max_new_tokens=c.max_new_tokens, seed=config.seed)


def _loader(
    config: ml_collections.ConfigDict, workdir: Path, mixture: Mixture, encoder: GroupEncoder, progress: Progress
) -> PromptLoader:
    """The loader of prompts at `progress`."""
    quarantine = Quarantine(
        workdir / "quarantine.jsonl",
        config.data.max_quarantine_rate,
        rejected=progress.rejected,
        fresh=progress.step == 0,
    )
    number = config.rollout.prompts
    options = LoaderOptions(batch_size=1, workers=config.data.workers, ahead=number, seed=config.seed)
    return PromptLoader(GroupStream(mixture, encoder, quarantine, options, progress.position), number)


def _held_out(
    config: ml_collections.ConfigDict, workdir: Path, encoder: Encoder, actor: Actor, judged: Callable
) -> HeldOut:
    c = config.eval
    source = open_held_out(config, c.path, c.root)
    group_encoder = GroupEncoder([source], encoder, as_prompt=judged)
    at_once, workers = config.rollout.prompts, config.data.workers
    return HeldOut(workdir / EVALS, group_encoder, actor, limit=c.limit, at_once=at_once, workers=workers)


def _facts(
    config: ml_collections.ConfigDict, mixture: Mixture, parts: Parts, weights: SamplingWeights
) -> dict[str, str]:
    c = config.rollout
    return {
        "records": f"{len(mixture):,} in {mixture.name}",
        "trained": f"{sum(x.size for x in jax.tree.leaves(parts.trainable)):,} parameters ({describe_trained(config)})",
        "completions of a step": f"{c.prompts} prompts x {c.completions}",
        "objective": f"{config.objective.preset}: {settings.objective_of(config)}",
        "rewards": ", ".join(config.reward.functions),
        "devices": f"{parts.mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(parts.mesh.shape)}, sampling on "
        f"{dict(weights.mesh.shape)}",
    }
