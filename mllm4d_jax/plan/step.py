"""The training step on shapes alone: what a run would compile, without weights, data or the devices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jax.sharding import Mesh

from configs.published import published_config
from mllm4d_jax.data.loader import LoaderOptions
from mllm4d_jax.encode.grids import VisionInputs
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.flops import Tuning
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.split import attach_lora, split_model
from mllm4d_jax.parallel.rules import parameter_sharding, placed, row_shardings
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.rows.rows import RowBatch, RowSizes
from mllm4d_jax.run.build import needs_adapter, tuning
from mllm4d_jax.run.optimizer import learning_rates, make_optimizer, optimizer_placement
from mllm4d_jax.sft.step import TrainStep

FRAME_PIXELS = 50176  # of a frame when video.max_pixels is 0: 224 x 224
# Qwen3-VL writes a time before each temporal patch and markers around it: "<12.5 seconds>" is 7 tokens.
TIME_TOKENS = 9


class PlanError(ValueError):
    """A plan that cannot be made; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """How long the texts of the records are taken to be, which no config says: in tokens.

    Attributes:
      branch: of a question with its answer; `answer`: of them supervised.
      system: before the video.
    """

    branch: int = 96
    answer: int = 24
    system: int = 32


@dataclasses.dataclass(frozen=True)
class PlanJob:
    """What is planned, apart from the devices.

    Attributes:
      config: of the run.
      model: sizes of the model.
      sizes: what a row is padded to.
      rows: of a micro-batch, over all devices.
      questions: of a row.
      texts: what the sizes suppose.
    """

    config: ml_collections.ConfigDict
    model: ModelConfig
    sizes: RowSizes
    rows: int
    questions: int
    texts: Texts


def plan_job(config: ml_collections.ConfigDict, texts: Texts | None = None) -> PlanJob:
    """The job of a config, for texts as long as given (None: as `Texts` has it). No file but the model's config.json is
    read.

    Raises:
      PlanError: no model is named.
      ModelConfigError, LoaderError: its config.json, or a batch that cannot be divided.
    """
    model = model_config(config)
    options = LoaderOptions.from_mapping(config.data, config.train.batch_size // config.train.accumulation)
    groups, rows = options.local(1)
    clips, texts = -(-groups // rows), texts or Texts()
    sizes = worst_sizes(config, model, clips, texts)
    return PlanJob(config, model, sizes, rows, clips * options.questions_per_video, texts)


def model_config(config: ml_collections.ConfigDict) -> ModelConfig:
    """The sizes of the model that the config names. Raises PlanError when it names none."""
    if config.model.published:
        return ModelConfig.from_dict(published_config(config.model.published), config.model.published)
    if not config.model.path:
        raise PlanError(
            "no model to plan for: --config.model.published=8b (or another published size), or "
            "--config.model.path=DIR with a config.json (weights are not needed)"
        )
    model = ModelConfig.from_folder(config.model.path)
    # Without weights it cannot be seen whether there is a head of its own; the larger case is planned.
    return dataclasses.replace(model, tied=bool(model.tied))


def worst_sizes(config: ml_collections.ConfigDict, model: ModelConfig, clips: int, texts: Texts) -> RowSizes:
    """Padded sizes of a full row: every clip as long and as large as the config lets it be."""
    t, tokens, patches = clip_shape(config, model)
    prefix = min(tokens + texts.system, config.data.max_tokens)
    options = LoaderOptions.from_mapping(config.data, config.train.batch_size // config.train.accumulation)
    buckets = options.buckets(1, merge_area=model.vision.merge_size**2, frames=t, frame_patches=patches)
    slots = clips * options.questions_per_video
    needed = RowSizes(clips * prefix, slots, texts.branch, clips * t, patches, slots * texts.answer)
    return buckets.sizes(needed)


def clip_shape(config: ml_collections.ConfigDict, model: ModelConfig) -> tuple[int, int, int]:
    """(frames of the vision tower, decoder tokens, patches per frame) of the largest clip that the config allows.

    Without a pixel budget that the config knows, what bounds a clip is data.max_tokens.
    """
    v, c = model.vision, config.video
    t = -(-c.num_frames // v.temporal_patch_size)
    extra = TIME_TOKENS if model.family == "qwen3_vl" else 0
    most = max(1, config.data.max_tokens // t - extra)
    area = c.max_pixels or (FRAME_PIXELS if c.resize_rule == "per_frame" else most * (v.patch_size * v.merge_size) ** 2)
    if c.resize_rule == "total" and c.max_pixels:
        area //= c.num_frames
    merged = min(max(1, area // (v.patch_size * v.merge_size) ** 2), most)
    return t, t * (merged + extra), merged * v.merge_size**2


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A step ready to be lowered.

    Attributes:
      step: the trainer's own.
      tuning: what it trains and how it attends, for the FLOP count.
      trees: shapes with shardings of "frozen", "trainable", "optimiser" and "batch".
    """

    step: TrainStep
    tuning: Tuning
    trees: dict[str, Any]

    def lower(self) -> jax.stages.Lowered:
        t = self.trees
        return self.step.lower(t["trainable"], t["optimiser"], t["frozen"], t["batch"])

    def bytes(self) -> dict[str, int]:
        """Bytes on one device, by tree; layouts of the devices may pad them."""
        return {name: local_bytes(tree) for name, tree in self.trees.items()}


def local_bytes(tree: Any) -> int:
    """Bytes of placed shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def abstract_step(job: PlanJob, mesh: Mesh, rows: int) -> AbstractStep:
    """The step that a run of `rows` rows a micro-batch compiles on the devices of `mesh`."""
    c = job.config
    model = abstract_model(c, job.model, mesh)
    graphdef, trainable, frozen = split_model(model, tuple(c.train.trainable))
    optimizer, opt_state = abstract_optimizer(c, trainable, mesh)
    batch = abstract_batch(job.model, job.sizes, rows)
    batch = jax.tree.map(placed, batch, row_shardings(batch, mesh))
    step = TrainStep(graphdef, optimizer, trainable, opt_state, mesh, c.train.loss_chunk, c.seed)
    trees = dict(frozen=frozen, trainable=trainable, optimiser=opt_state, batch=batch)
    what = dataclasses.replace(tuning(c, model), attention=str(model.backend))
    return AbstractStep(step, what, trees)


def abstract_optimizer(
    config: ml_collections.ConfigDict, trainable: Any, mesh: Mesh
) -> tuple[optax.GradientTransformation, Any]:
    """The run's optimiser, and the shapes of its state for the given tree of shapes."""
    o = config.optim
    rates = learning_rates(o.lr, config.train.steps, o.warmup_ratio, o.schedule)
    optimizer = make_optimizer(rates, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
    places = optimizer_placement(optimizer, trainable, mesh)
    return optimizer, jax.tree.map(placed, jax.eval_shape(optimizer.init, trainable), places)


def abstract_model(config: ml_collections.ConfigDict, sizes: ModelConfig, mesh: Mesh) -> QwenVL:
    """The run's model with adapters, as shapes placed on `mesh`."""
    settings = config.model

    def make() -> QwenVL:
        how = dict(attention=settings.attention, remat=settings.remat, vision_remat=settings.vision_remat)
        rngs = nnx.Rngs(0)
        model = QwenVL(sizes, dtype=jnp.dtype(settings.dtype), mesh=mesh, rngs=rngs, **how)
        if needs_adapter(config):
            lora = config.lora
            rate = lora.get("dropout", 0.0)  # reinforcement learning has none
            attach_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=rate, rngs=rngs)
        return model

    graphdef, state = nnx.split(nnx.eval_shape(make))
    found = []
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        sharding = parameter_sharding(variable.get_metadata("logical_axes"), value.shape, mesh)
        found.append((path, variable.replace(placed(value, sharding))))
    return nnx.merge(graphdef, nnx.from_flat_state(found))


def abstract_batch(model: ModelConfig, sizes: RowSizes, rows: int) -> RowBatch:
    """Shapes of a batch of `rows` rows."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    v, frames = model.vision, (rows * sizes.frames, sizes.frame_patches)
    vision = VisionInputs(
        patches=floats(*frames, v.patch_dim),
        rowcol=ints(*frames, 2),
        frame_segments=ints(*frames),
        window_segments=ints(*frames) if v.window else None,
        table_index=ints(*frames, 4) if v.position_side else None,
        table_weight=floats(*frames, 4) if v.position_side else None,
    )
    tokens = (rows, sizes.layout.size)
    inputs = ModelInputs(ints(*tokens), ints(3, *tokens), ints(*tokens), ints(*tokens), vision, sizes.layout)
    losses = (rows, sizes.supervised)
    return RowBatch(inputs, ints(*losses), ints(*losses), floats(*losses))
