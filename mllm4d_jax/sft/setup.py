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
from mllm4d_jax.data.stream import GroupStream
from mllm4d_jax.parallel.chips import peak_flops
from mllm4d_jax.run.begin import Begun, begin
from mllm4d_jax.run.build import Parts, loader_options, open_held_out
from mllm4d_jax.run.checkpoint import Checkpoints
from mllm4d_jax.run.fitting import remat_forms
from mllm4d_jax.run.start import start_from_run
from mllm4d_jax.run.throughput import FlopCounter
from mllm4d_jax.sft.held_out import HeldOutLoss
from mllm4d_jax.sft.step import Trainer, TrainStep

_SAMPLE = {
    "what it shows": "that the training path works here: a sample run learns a few answers by heart and measures "
    "nothing about understanding video"
}


@dataclasses.dataclass(frozen=True)
class SftSetup:
    """A run ready to train.

    Attributes:
      begun: what every task has.
      loader: of its batches; `flops`: of one of them.
      trainer: its state.
      held_out: measures the loss on data.eval_path; None without one.
    """

    begun: Begun
    loader: Loader
    flops: FlopCounter
    trainer: Trainer
    held_out: HeldOutLoss | None

    @property
    def facts(self) -> Mapping[str, str]:
        """For the report."""
        return self.begun.facts() | (_SAMPLE if self.begun.config.data.sample == "tiny" else {})


def set_up(config: ml_collections.ConfigDict, workdir: Path, checkpoints: Checkpoints) -> SftSetup:
    """Load everything a run needs and restore the newest checkpoint. Raises as `task.run`."""
    c = config.data
    records = open_held_out(config, c.eval_path, c.eval_root) if c.eval_path else None
    begun = begin(config, workdir, checkpoints, records)
    loader, parts, held_out = make_loader(begun), begun.parts, None
    if records is not None:
        encoder, model = GroupEncoder([records], begun.encoder), (parts.graphdef, parts.frozen, parts.mesh)
        held_out = HeldOutLoss(encoder, loader.stream.options, parts.shape, *model, config.train.loss_chunk)
    return SftSetup(begun, loader, FlopCounter(parts.sizes, parts.tuning), make_trainer(begun), held_out)


def make_trainer(begun: Begun) -> Trainer:
    """Return the trainer of a run: restored from its checkpoint, or at the start with a fresh optimiser."""
    parts, config, progress = begun.parts, begun.config, begun.progress
    trainable, opt_state = parts.trainable, parts.opt_state
    if progress.step:
        trainable, opt_state = begun.checkpoints.restore(progress.step, trainable, opt_state)
    else:
        trainable = start_from_run(config, trainable, begun.content)
    step = train_step(parts, trainable, opt_state)
    peak = peak_flops(parts.mesh.devices.flat[0].device_kind) if config.model.dtype == "bfloat16" else None
    return Trainer(step, parts.frozen, trainable, opt_state, parts.rates, peak)


def train_step(parts: Parts, trainable: Any, opt_state: Any) -> TrainStep:
    """Return the compiled step for trees of arrays, or of shapes with shardings."""
    chunk, seed = parts.config.train.loss_chunk, parts.config.seed
    remat = remat_forms(parts.config.model.remat, parts.mesh.devices.flat[0].platform)
    trees = parts.graphdef, parts.optimizer, trainable, opt_state
    return TrainStep(*trees, parts.mesh, chunk, seed, remat)


def make_loader(begun: Begun) -> Loader:
    """Return the loader of a run's micro-batches."""
    options = dataclasses.replace(
        loader_options(begun.config),
        ahead=begun.config.train.accumulation,
        seed=begun.config.seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    encoder = GroupEncoder(begun.mixture.sources, begun.encoder)
    quarantine = begun.open_quarantine(options.questions_per_video)
    stream = GroupStream(begun.mixture, encoder, quarantine, options, begun.progress.position)
    return Loader(stream, begun.parts.shape)
