"""A run ready to train: model, optimiser, loader and checkpoint put together as the config says."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.loader import Loader, LoaderOptions
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.data.steps import ModelFacts
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.models.peft import is_peft_folder
from mllm4d_jax.models.qwen_vl import QwenVL, vision_geometry
from mllm4d_jax.models.split import split_model
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.run import preflight
from mllm4d_jax.run.build import load_trainable, resume_point, tuning, what_is_trained
from mllm4d_jax.run.checkpoint import Checkpoints, load_start
from mllm4d_jax.run.log import write_config
from mllm4d_jax.run.optimizer import init_optimizer, learning_rates, make_optimizer
from mllm4d_jax.run.progress import Progress
from mllm4d_jax.run.throughput import FlopCounter, peak_flops
from mllm4d_jax.sft.held_out import HeldOutLoss
from mllm4d_jax.sft.step import TrainStep
from mllm4d_jax.sft.trainer import Trainer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run ready to train.

    Attributes:
      config: with the sample's paths in place.
      workdir: of the run.
      checkpoints: where it is saved.
      content: digests for `checkpoint.check_resumable`.
      encoder, loader: its data.
      trainer: its state.
      flops: of a batch.
      facts: for the report.
      held_out: measures the loss on data.eval_path; None without one.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    checkpoints: Checkpoints
    content: Mapping[str, str]
    encoder: Encoder
    loader: Loader
    trainer: Trainer
    flops: FlopCounter
    facts: Mapping[str, Any]
    held_out: HeldOutLoss | None


def build(config: ml_collections.ConfigDict, workdir: Path, checkpoints: Checkpoints) -> Job:
    """Loads everything a run needs and restores the newest checkpoint. Raises as `run`."""
    mixture = preflight.open_data(config)
    content = preflight.content_digests(config, mixture)
    progress = resume_point(config, content, checkpoints)
    if multihost.is_primary():
        write_config(workdir / "config.json", config.to_dict())
    mesh = make_mesh(dict(config.mesh))
    model = load_trainable(config, mesh)
    trainer, frozen_size = make_trainer(config, model, mesh, checkpoints, progress, content)
    encoder = Encoder(
        ProcessorConfig.from_folder(config.model.path),
        Tokenizer.from_folder(config.model.path),
        VideoOptions.from_mapping(config.video),
        config.data.max_tokens,
    )
    sizes = f"{sum(x.size for x in jax.tree.leaves(trainer.trainable)):,}"
    facts = {
        "records": f"{len(mixture):,} in {mixture.name}",
        "trainable parameters": f"{sizes} ({what_is_trained(config)})",
        "frozen parameters": f"{frozen_size:,}",
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind} of {jax.process_count()} process(es), "
        f"mesh {dict(mesh.shape)}",
    }
    loader = make_loader(config, workdir, mixture, encoder, vision_geometry(model.config), progress)
    flops = FlopCounter(model.config, tuning(config, model))
    held_out = make_held_out(config, model, mesh, loader) if config.data.eval_path else None
    return Job(config, workdir, checkpoints, content, encoder, loader, trainer, flops, facts, held_out)


def make_loader(
    config: ml_collections.ConfigDict,
    workdir: Path,
    mixture: Mixture,
    encoder: Encoder,
    geometry: VisionGeometry,
    progress: Progress,
) -> Loader:
    """The loader of micro-batches at `progress`."""
    options = LoaderOptions.from_mapping(config.data, config.train.batch_size // config.train.accumulation)
    hosts, c = jax.process_count(), encoder.config
    buckets = options.buckets(
        hosts,
        merge_area=c.merge_size**2,
        frames=-(-(config.video.num_frames) // c.temporal_patch_size),
        frame_patches=(encoder.max_frame_pixels or 0) // c.patch_size**2,
    )
    quarantine = Quarantine(
        workdir / "quarantine.jsonl",
        config.data.max_quarantine_rate,
        rejected=multihost.share(progress.rejected),
        fresh=progress.step == 0,
        host=jax.process_index(),
        per_group=options.questions_per_video,
    )
    model = ModelFacts(geometry, (c.image_token_id, c.video_token_id), 3 * c.temporal_patch_size * c.patch_size**2)
    return Loader(
        mixture,
        GroupEncoder(mixture.sources, encoder),
        options,
        buckets,
        model,
        quarantine,
        seed=config.seed,
        position=progress.position,
        host=jax.process_index(),
        hosts=hosts,
    )


def make_held_out(
    config: ml_collections.ConfigDict, model: QwenVL, mesh: jax.sharding.Mesh, loader: Loader
) -> HeldOutLoss:
    """What measures the loss on data.eval_path. Raises PreflightError when there are no records there."""
    graphdef, _, frozen = split_model(model, tuple(config.train.trainable))
    source = preflight.open_held_out(config)
    encoder = GroupEncoder([source], loader.encoder.encoder)
    rows = (loader.options, loader.buckets, loader.facts)
    return HeldOutLoss(encoder, *rows, graphdef, frozen, mesh, config.train.loss_chunk)


def make_trainer(
    config: ml_collections.ConfigDict,
    model: QwenVL,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    progress: Progress,
    content: Mapping[str, str],
) -> tuple[Trainer, int]:
    """The trainer at `progress`, and the number of frozen parameters.

    At step 0 the parameters are those of `model.adapter`, if the config names one; the optimiser is always fresh then.
    """
    graphdef, trainable, frozen = split_model(model, tuple(config.train.trainable))
    o = config.optim
    rates = learning_rates(o.lr, config.train.steps, o.warmup_ratio, o.schedule)
    optimizer = make_optimizer(rates, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
    opt_state = init_optimizer(optimizer, trainable, mesh)
    if progress.step:
        trainable, opt_state = checkpoints.restore(progress.step, trainable, opt_state)
    elif config.model.adapter and not is_peft_folder(config.model.adapter):
        trainable = load_start(config.model.adapter, trainable, preflight.flat_config(config), content)
    step = TrainStep(graphdef, optimizer, trainable, opt_state, mesh, config.train.loss_chunk, config.seed)
    frozen_size = sum(x.size for x in jax.tree.leaves(frozen))
    peak = peak_flops(mesh.devices.flat[0].device_kind) if config.model.dtype == "bfloat16" else None
    return Trainer(step, frozen, trainable, opt_state, rates, progress, peak), frozen_size
