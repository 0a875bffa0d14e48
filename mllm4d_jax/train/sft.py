"""Supervised fine-tuning: the run itself, from preflight to report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.loader import Loader, LoaderOptions
from mllm4d_jax.data.prefetch import Prefetcher
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.samples import write_sample_world
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.data.steps import ModelFacts
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.lora import attach_lora
from mllm4d_jax.models.qwen_vl import QwenVL, vision_geometry
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.processing.config import ProcessorConfig
from mllm4d_jax.processing.encode import Encoder, VideoOptions
from mllm4d_jax.processing.errors import RecordError
from mllm4d_jax.processing.grids import VisionGeometry
from mllm4d_jax.processing.tokenizer import Tokenizer
from mllm4d_jax.train import preflight
from mllm4d_jax.train.checkpoint import Checkpoints, Meta, ResumeError, check_resumable
from mllm4d_jax.train.metrics import RunLog, read_metrics, write_config, write_curve, write_report
from mllm4d_jax.train.state import init_optimizer, learning_rates, make_optimizer, split_model
from mllm4d_jax.train.step import TrainStep, batch_shards
from mllm4d_jax.train.tiny import write_tiny_model
from mllm4d_jax.train.trainer import Progress, StopSignal, Trainer

log = logging.getLogger(__name__)

_TOKENIZER_RECORDS = 1000  # records a tiny model's tokenizer is learned from


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Trains a LoRA adapter as the config says, continuing from the workdir's newest checkpoint if there is one.

    Args:
      config: every key of the "sft" task.
      workdir: gets config.json, checkpoints/, metrics.jsonl, tb/, quarantine.jsonl, curve.png and report.md.

    Returns:
      0, also when it was asked to stop (SIGINT, SIGTERM): the state is saved and the same command goes on.

    Raises:
      PreflightError: something is missing; lists everything.
      ResumeError: the workdir holds a run with other settings.
      QuarantineError: too many unusable records.
      TrainingError: loss or gradient is not finite.
    """
    folder = open_workdir(workdir)
    config = with_sample(config, folder)
    preflight.check(config)
    steps = config.train.steps
    with Checkpoints(folder / "checkpoints", config.train.keep_checkpoints) as checkpoints, StopSignal() as stop:
        job = build(config, folder, checkpoints)
        for name, value in job.facts.items():
            print(f"{name}: {value}")
        if job.trainer.progress.step < steps:
            with job.encoder:
                train(job, stop)
    done = job.trainer.progress.step
    if done < steps:
        print(f"stopped after step {done} of {steps} and saved; the same command goes on from there")
        return 0
    report(job)
    print(f"{done} steps done: see {folder / 'report.md'}")
    return 0


def open_workdir(workdir: str) -> Path:
    """Makes the folder. Raises PreflightError when it cannot be."""
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise preflight.PreflightError(f"workdir '{workdir}' cannot be written: {problem.strerror}") from problem
    return Path(workdir)


def with_sample(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """The config with the tiny sample in place of what is not configured; unchanged without data.sample.

    Without data of the user's own, the sample world is written; without a model, a tiny random one whose tokenizer is
    learned from the records.

    Raises:
      PreflightError: data.path or data.mixture names something that holds no records.
    """
    if not config.data.sample:
        return config
    config = config.copy_and_resolve_references()
    sample = workdir / "sample"
    if not config.data.path and not config.data.root and not preflight.mixture_entries(config):
        records = write_sample_world(sample / "world", config.seed)
        config.data.path, config.data.root = str(records), str(records.parent)
    if not config.model.path:
        problems = list(preflight.data_problems(config))
        if problems:
            raise preflight.PreflightError("; ".join(problems))
        write_tiny_model(sample / "model", record_texts(preflight.open_data(config)), config.seed)
        config.model.path = str(sample / "model")
    return config


def record_texts(mixture: Mixture) -> list[str]:
    """Texts of the first records, for a tokenizer; records that cannot be read are left to the loader to report."""
    texts = []
    for source in mixture.sources:
        for i in range(min(len(source), _TOKENIZER_RECORDS)):
            try:
                messages = source[i].messages
            except RecordError:
                continue
            parts = [p for m in messages for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
            texts += [
                p if isinstance(p, str) else p["text"] for p in parts if isinstance(p, str) or p["type"] == "text"
            ]
    return texts


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
      facts: for the report.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    checkpoints: Checkpoints
    content: Mapping[str, str]
    encoder: Encoder
    loader: Loader
    trainer: Trainer
    facts: Mapping[str, Any]


def build(config: ml_collections.ConfigDict, workdir: Path, checkpoints: Checkpoints) -> Job:
    """Loads everything a run needs and restores the newest checkpoint. Raises as `run`."""
    mixture = preflight.open_data(config)
    content = preflight.content_digests(config, mixture)
    progress = resume_point(config, content, checkpoints)
    write_config(workdir / "config.json", config.to_dict())
    mesh = make_mesh(dict(config.mesh))
    model, trainable = load_trainable(config, mesh)
    trainer, frozen_size = make_trainer(config, model, mesh, checkpoints, progress)
    encoder = Encoder(
        ProcessorConfig.from_folder(config.model.path),
        Tokenizer.from_folder(config.model.path),
        VideoOptions.from_mapping(config.video),
        config.data.max_tokens,
    )
    facts = {
        "records": f"{len(mixture):,} in {mixture.name}",
        "trainable parameters": f"{trainable:,} (LoRA rank {config.lora.rank} on {', '.join(config.lora.targets)})",
        "frozen parameters": f"{frozen_size:,}",
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}",
    }
    loader = make_loader(config, workdir, mixture, encoder, vision_geometry(model.config), mesh, progress)
    return Job(config, workdir, checkpoints, content, encoder, loader, trainer, facts)


def make_loader(
    config: ml_collections.ConfigDict,
    workdir: Path,
    mixture: Mixture,
    encoder: Encoder,
    geometry: VisionGeometry,
    mesh: jax.sharding.Mesh,
    progress: Progress,
) -> Loader:
    """The loader at `progress`."""
    options = LoaderOptions.from_mapping(config.data, config.train.batch_size)
    hosts, c = jax.process_count(), encoder.config
    buckets = options.buckets(
        hosts,
        merge_area=c.merge_size**2,
        frames=-(-(config.video.num_frames) // c.temporal_patch_size),
        frame_patches=(encoder.max_frame_pixels or 0) // c.patch_size**2,
        shards=max(1, batch_shards(mesh) // hosts),
    )
    quarantine = Quarantine(
        workdir / "quarantine.jsonl",
        config.data.max_quarantine_rate,
        rejected=progress.rejected,
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


def resume_point(config: ml_collections.ConfigDict, content: Mapping[str, str], checkpoints: Checkpoints) -> Progress:
    """Progress of the newest checkpoint, or of a run from the start.

    Raises:
      ResumeError: the checkpoint is of a run with other settings, or train.resume is off and there is one.
    """
    latest = checkpoints.latest()
    if latest is None:
        return Progress()
    if not config.train.resume:
        raise ResumeError(
            f"{checkpoints.folder} already holds step {latest}: give another --workdir for a new run, or leave "
            "train.resume on to go on with that one"
        )
    stored = checkpoints.meta(latest)
    check_resumable(stored, preflight.flat_config(config), content, checkpoints.folder)
    log.info("continuing after step %d", latest)
    return Progress(stored.step, stored.position, stored.rejected)


def load_trainable(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> tuple[QwenVL, int]:
    """The base model with a fresh adapter, and the number of trainable parameters."""
    model = load_model(
        config.model.path,
        dtype=jnp.dtype(config.model.dtype),
        mesh=mesh,
        attention=config.model.attention,
        remat=config.model.remat,
    )
    lora = config.lora
    rngs = nnx.Rngs(config.seed)
    return model, attach_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rngs=rngs, mesh=mesh)


def make_trainer(
    config: ml_collections.ConfigDict,
    model: QwenVL,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    progress: Progress,
) -> tuple[Trainer, int]:
    """The trainer at `progress`, and the number of frozen parameters."""
    graphdef, lora, frozen = split_model(model)
    o = config.optim
    rates = learning_rates(o.lr, config.train.steps, o.warmup_ratio, o.schedule)
    optimizer = make_optimizer(rates, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
    opt_state = init_optimizer(optimizer, lora, mesh)
    if progress.step:
        lora, opt_state = checkpoints.restore(progress.step, lora, opt_state)
    step = TrainStep(graphdef, optimizer, lora, opt_state, mesh, config.train.loss_chunk)
    frozen_size = sum(x.size for x in jax.tree.leaves(frozen))
    return Trainer(step, frozen, lora, opt_state, rates, progress), frozen_size


def train(job: Job, stop: StopSignal) -> None:
    """Runs steps until the last one or until asked to stop, and saves. Raises as `run`."""
    c, trainer = job.config.train, job.trainer
    saved = trainer.progress.step
    with (
        RunLog(job.workdir, steps=c.steps, start=saved, log_every=c.log_every) as run_log,
        job.loader,
        Prefetcher(job.loader.next_batch) as batches,
    ):
        asked = time.perf_counter()
        while trainer.progress.step < c.steps and not stop:
            loaded = batches.poll(timeout=0.5)
            if loaded is None:
                continue
            run_log.step(trainer.advance(loaded, time.perf_counter() - asked))
            if trainer.progress.step % c.checkpoint_every == 0:
                run_log.step(trainer.finish())
                save(job)
                saved = trainer.progress.step
            asked = time.perf_counter()
        run_log.step(trainer.finish())
        if trainer.progress.step > saved:
            save(job)


def save(job: Job) -> None:
    """Saves the state after the last step."""
    meta = Meta(
        **dataclasses.asdict(job.trainer.progress), config=preflight.flat_config(job.config), content=job.content
    )
    job.checkpoints.save(job.trainer.lora, job.trainer.opt_state, meta)


def report(job: Job) -> None:
    """Writes curve.png and report.md from metrics.jsonl."""
    rows = read_metrics(job.workdir / "metrics.jsonl")
    write_curve(job.workdir / "curve.png", rows, f"SFT, {rows[-1]['step']} steps")
    seconds = sum(r["step_s"] for r in rows)
    facts = {
        **job.facts,
        "time in steps": f"{seconds:.0f} s, of which {sum(r['data_wait_s'] for r in rows):.0f} s waiting for data",
        "compiled steps": f"{rows[-1]['compiles']} since the last start, {rows[-1]['retraces']} of them retraces",
        "records skipped": rows[-1]["quarantined"],
    }
    if job.config.data.sample:
        facts["what it shows"] = (
            "that the training path works here: a sample run learns a few answers by heart and measures nothing about "
            "understanding video"
        )
    write_report(job.workdir / "report.md", rows, preflight.flat_config(job.config), facts)
