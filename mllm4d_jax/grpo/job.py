"""A run of reinforcement learning put together as the config says: model, prompts, sampler, learner, checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.sources import Mixture, open_source
from mllm4d_jax.data.stream import GroupStream
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.generate.draw import SamplingOptions
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.generate.weights import SamplingWeights, sampling_mesh
from mllm4d_jax.grpo import settings
from mllm4d_jax.grpo.actor import Actor, Encode, ModelSide
from mllm4d_jax.grpo.held_out import HeldOut
from mllm4d_jax.grpo.learner import Learner
from mllm4d_jax.grpo.prompts import PromptLoader, as_prompt, as_scored_prompt
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.peft import is_peft_folder
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.split import split_model
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.rules import batch_shards
from mllm4d_jax.qa.custom_rewards import Rewards
from mllm4d_jax.rows.buckets import RowBuckets
from mllm4d_jax.run import preflight
from mllm4d_jax.run.build import load_trainable, resume_point, what_is_trained
from mllm4d_jax.run.checkpoint import Checkpoints, load_start
from mllm4d_jax.run.log import write_config
from mllm4d_jax.run.optimizer import init_optimizer, learning_rates, make_optimizer
from mllm4d_jax.run.progress import Progress


@dataclasses.dataclass
class State:
    """What a step changes.

    Attributes:
      trainable, opt_state: trees on the devices.
      progress: steps done, and the data's state after the completions drawn so far.
    """

    trainable: Any
    opt_state: Any
    progress: Progress


@dataclasses.dataclass(frozen=True)
class Job:
    """A run ready to train.

    Attributes:
      config, workdir, checkpoints, content: as in `sft.job.Job`.
      encoder: its decoder processes have to be closed.
      loader: of prompts.
      actor, learner, weights: see their modules.
      held_out: None without held-out prompts.
      frozen: tree of the base weights; `reference`: tree of the policy at the start, None without a KL term.
      state: of the run.
      rates: f32[steps].
      facts: for the report.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    checkpoints: Checkpoints
    content: Mapping[str, str]
    encoder: Encoder
    loader: PromptLoader
    actor: Actor
    learner: Learner
    weights: SamplingWeights
    held_out: HeldOut | None
    frozen: Any
    reference: Any
    state: State
    rates: np.ndarray
    facts: Mapping[str, Any]

    def sampling_weights(self) -> tuple:
        """Trees of the policy as it is now, for the sampler."""
        return self.weights.of(self.state.trainable)


def build(config: ml_collections.ConfigDict, workdir: Path, checkpoints: Checkpoints) -> Job:
    """Loads everything a run needs and restores the newest checkpoint. Raises as `grpo.run`."""
    mixture = preflight.open_data(config)
    content = preflight.content_digests(config, mixture)
    progress = resume_point(config, content, checkpoints)
    write_config(workdir / "config.json", config.to_dict())
    mesh = make_mesh(dict(config.mesh))
    model = load_trainable(config, mesh)
    patterns = tuple(config.train.trainable)
    graphdef, trainable, frozen = split_model(model, patterns)
    objective, o = settings.objective_of(config), config.optim
    rates = learning_rates(o.lr, config.train.steps, o.warmup_ratio, o.schedule)
    updates = np.repeat(rates, config.objective.iterations)
    optimizer = make_optimizer(updates, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
    trainable = _start(config, workdir, trainable, content, fresh=progress.step == 0)
    reference = jax.tree.map(lambda x: x.copy(), trainable) if objective.beta > 0 else None
    opt_state = init_optimizer(optimizer, trainable, mesh)
    if progress.step:
        trainable, opt_state = checkpoints.restore(progress.step, trainable, opt_state)
    encoder = Encoder(
        ProcessorConfig.from_folder(config.model.path),
        Tokenizer.from_folder(config.model.path),
        VideoOptions.from_mapping(config.video),
        config.data.max_tokens,
    )
    sampling = settings.sampling_of(config, encoder.tokenizer, model.config.text.vocab_size)
    how = dict(temperature=sampling.temperature, banned_ids=sampling.banned_ids, chunk=config.train.loss_chunk)
    learner = Learner(graphdef, optimizer, trainable, opt_state, objective, mesh=mesh, **how)
    places = dict(learner_mesh=mesh, patterns=patterns, attention=config.model.attention)
    weights = SamplingWeights(graphdef, trainable, frozen, sampling_mesh(mesh, config.rollout.tensor), **places)
    state = State(trainable, opt_state, progress)

    def encode(vision: Any, prompts: int) -> Any:
        return learner.encode(state.trainable, frozen, vision, prompts)

    rewards = settings.rewards_of(config)
    judged = as_prompt if rewards.builtin is None else as_scored_prompt
    side = model_side(config, model.config, encoder)
    actor, tester = make_actors(config, weights, encoder.tokenizer, side, encode, rewards, sampling)
    c = config.rollout
    facts = {
        "records": f"{len(mixture):,} in {mixture.name}",
        "trained": f"{sum(x.size for x in jax.tree.leaves(trainable)):,} parameters ({what_is_trained(config)})",
        "completions of a step": f"{c.prompts} prompts x {c.completions}",
        "objective": f"{config.objective.preset}: {objective}",
        "rewards": ", ".join(config.reward.functions),
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}, sampling on "
        f"{dict(weights.mesh.shape)}",
    }
    return Job(
        config=config,
        workdir=workdir,
        checkpoints=checkpoints,
        content=content,
        encoder=encoder,
        loader=make_loader(
            config, workdir, mixture, GroupEncoder(mixture.sources, encoder, as_prompt=judged), progress
        ),
        actor=actor,
        learner=learner,
        weights=weights,
        held_out=make_held_out(config, workdir, encoder, tester, judged),
        frozen=frozen,
        reference=reference,
        state=state,
        rates=rates,
        facts=facts,
    )


def _start(config: ml_collections.ConfigDict, workdir: Path, trainable: Any, content: Mapping, *, fresh: bool) -> Any:
    """The trained tree at step 0: what the reference is, too.

    It is kept in the workdir, since the run that `model.adapter` names may go on or be deleted.
    """
    with Checkpoints(workdir / "start", keep=1) as kept:
        if not fresh:
            return kept.restore_trainable(0, trainable)
        if config.model.adapter and not is_peft_folder(config.model.adapter):
            trainable = load_start(config.model.adapter, trainable, preflight.flat_config(config), content)
        kept.replace_trainable(0, trainable)
    return trainable


def model_side(config: ml_collections.ConfigDict, model: ModelConfig, encoder: Encoder) -> ModelSide:
    """Sizes of prompts and completions."""
    c = encoder.config
    buckets = RowBuckets(
        prefix=tuple(config.data.prefix_buckets),
        length=tuple(config.rollout.buckets),
        merge_area=c.merge_size**2,
        full_frames=-(-config.video.num_frames // c.temporal_patch_size),
        full_frame_patches=(encoder.max_frame_pixels or 0) // c.patch_size**2,
    )
    return ModelSide(vision_geometry(model), (c.image_token_id, c.video_token_id), buckets)


def make_sampler(config: ml_collections.ConfigDict, weights: SamplingWeights) -> Sampler:
    """The sampler on its mesh."""
    c = config.rollout
    ladder = Ladder(ratio=c.ladder_ratio, shards=batch_shards(weights.mesh))
    return Sampler(weights.graphdef, weights.mesh, chunk=c.chunk, ladder=ladder)


def make_actors(
    config: ml_collections.ConfigDict,
    weights: SamplingWeights,
    tokenizer: Tokenizer,
    side: ModelSide,
    encode: Encode,
    rewards: Rewards,
    sampling: SamplingOptions,
) -> tuple[Actor, Actor]:
    """The actor of the steps, and one that gives a greedy completion per held-out prompt; they share the sampler."""
    c = config.rollout
    shared = (make_sampler(config, weights), tokenizer, side, encode, rewards)
    common = dict(max_new_tokens=c.max_new_tokens, seed=config.seed)
    greedy = dataclasses.replace(sampling, temperature=0.0, require_exact=False)
    actor = Actor(*shared, sampling, branches=c.completions, prompts_at_once=c.prompts_at_once, **common)
    return actor, Actor(*shared, greedy, branches=1, **common)


def make_loader(
    config: ml_collections.ConfigDict, workdir: Path, mixture: Mixture, encoder: GroupEncoder, progress: Progress
) -> PromptLoader:
    """The loader of prompts at `progress`."""
    quarantine = Quarantine(
        workdir / "quarantine.jsonl",
        config.data.max_quarantine_rate,
        rejected=progress.rejected,
        fresh=progress.step == 0,
    )
    stream = GroupStream(
        mixture,
        encoder,
        quarantine,
        per_group=1,
        step_groups=1,
        workers=config.data.workers,
        seed=config.seed,
        position=progress.position,
    )
    return PromptLoader(stream, config.rollout.prompts)


def make_held_out(
    config: ml_collections.ConfigDict, workdir: Path, encoder: Encoder, actor: Actor, judged: Any
) -> HeldOut | None:
    """The held-out prompts, None when the config names none."""
    c = config.eval
    if not c.path:
        return None
    source = open_source(c.path, c.root or config.data.root, preflight.system_prompt(config))
    group_encoder = GroupEncoder([source], encoder, as_prompt=judged)
    return HeldOut(workdir / "evals.jsonl", group_encoder, actor, limit=c.limit, at_once=config.rollout.prompts)
