"""A run of fine-tuning put together, with its loader, trainer and held-out loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.loader import Loader
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.sources import Mixture, RecordSource
from mllm4d_jax.data.stream import GroupStream
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.chips import peak_flops
from mllm4d_jax.report.reading import CONFIG
from mllm4d_jax.run.build import (
    Parts,
    build,
    describe_trained,
    encoder_of,
    loader_options,
    open_held_out,
    open_records,
)
from mllm4d_jax.run.checkpoint import Checkpoints
from mllm4d_jax.run.digest import content_digests
from mllm4d_jax.run.loop import Progress
from mllm4d_jax.run.start import resume_point, start_from_run
from mllm4d_jax.run.throughput import FlopCounter
from mllm4d_jax.sft.held_out import HeldOutLoss
from mllm4d_jax.sft.step import Trainer, TrainStep


@dataclasses.dataclass(frozen=True)
class SftSetup:
    """A run ready to train.

    Attributes:
      content: digests for `checkpoint.check_resumable`.
      progress: where it begins.
      encoder, loader: its data.
      trainer: its state.
      flops: of a batch.
      held_out: measures the loss on data.eval_path; None without one.
      facts: for the report.
    """

    content: Mapping[str, str]
    progress: Progress
    encoder: Encoder
    loader: Loader
    trainer: Trainer
    flops: FlopCounter
    held_out: HeldOutLoss | None
    facts: Mapping[str, Any]


def set_up(config: ml_collections.ConfigDict, workdir: Path, checkpoints: Checkpoints) -> SftSetup:
    """Load everything a run needs and restore the newest checkpoint. Raises as `task.run`."""
    mixture = open_records(config)
    c = config.data
    held_out = open_held_out(config, c.eval_path, c.eval_root) if c.eval_path else None
    content = content_digests(config.model.path, mixture, held_out)
    progress = resume_point(config, content, checkpoints)
    if multihost.is_primary():
        write_json(workdir / CONFIG, config.to_dict())
    parts = build(config)
    encoder = encoder_of(config)
    loader = make_loader(parts, workdir, mixture, encoder, progress)
    return SftSetup(
        content=content,
        progress=progress,
        encoder=encoder,
        loader=loader,
        trainer=make_trainer(parts, checkpoints, progress, content),
        flops=FlopCounter(parts.sizes, parts.tuning),
        held_out=None if held_out is None else _held_out(held_out, parts, loader),
        facts=_facts(config, mixture, parts),
    )


def _facts(config: ml_collections.ConfigDict, mixture: Mixture, parts: Parts) -> dict[str, str]:
    trained, frozen = (f"{sum(x.size for x in jax.tree.leaves(tree)):,}" for tree in (parts.trainable, parts.frozen))
    return {
        "records": f"{len(mixture):,} in {mixture.name}",
        "trainable parameters": f"{trained} ({describe_trained(config)})",
        "frozen parameters": frozen,
        "devices": f"{parts.mesh.size} x {jax.devices()[0].device_kind} of {jax.process_count()} process(es), "
        f"mesh {dict(parts.mesh.shape)}",
    }


def make_trainer(parts: Parts, checkpoints: Checkpoints, progress: Progress, content: Mapping[str, str]) -> Trainer:
    """Return the trainer at `progress`: restored from its checkpoint, or at the start with a fresh optimiser."""
    config, trainable, opt_state = parts.config, parts.trainable, parts.opt_state
    if progress.step:
        trainable, opt_state = checkpoints.restore(progress.step, trainable, opt_state)
    else:
        trainable = start_from_run(config, trainable, content)
    step = train_step(parts, trainable, opt_state)
    peak = peak_flops(parts.mesh.devices.flat[0].device_kind) if config.model.dtype == "bfloat16" else None
    return Trainer(step, parts.frozen, trainable, opt_state, parts.rates, peak)


def train_step(parts: Parts, trainable: Any, opt_state: Any) -> TrainStep:
    """Return the compiled step for trees of arrays, or of shapes with shardings."""
    chunk, seed = parts.config.train.loss_chunk, parts.config.seed
    return TrainStep(parts.graphdef, parts.optimizer, trainable, opt_state, parts.mesh, chunk, seed)


def make_loader(parts: Parts, workdir: Path, mixture: Mixture, encoder: Encoder, progress: Progress) -> Loader:
    """Return the loader of micro-batches at `progress`."""
    config = parts.config
    options = dataclasses.replace(
        loader_options(config),
        ahead=config.train.accumulation,
        seed=config.seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    quarantine = Quarantine(
        workdir / "quarantine.jsonl",
        config.data.max_quarantine_rate,
        rejected=multihost.share(progress.rejected),
        fresh=progress.step == 0,
        host=jax.process_index(),
        per_group=options.questions_per_video,
    )
    stream = GroupStream(mixture, GroupEncoder(mixture.sources, encoder), quarantine, options, progress.position)
    return Loader(stream, parts.shape)


def _held_out(source: RecordSource, parts: Parts, loader: Loader) -> HeldOutLoss:
    encoder = GroupEncoder([source], loader.stream.encoder.encoder)
    options, chunk = loader.stream.options, parts.config.train.loss_chunk
    return HeldOutLoss(encoder, options, parts.shape, parts.graphdef, parts.frozen, parts.mesh, chunk)
