"""What a run is put together from, each piece from the config in one place: mesh, encoder, records, row shape, model
and optimiser; real, or abstract (shapes with shardings, for plans).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from configs.published import SIZES, published_config
from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.data.sources import Mixture, RecordSource, open_mixture
from mllm4d_jax.data.stream import LoaderError, LoaderOptions
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.flops import Tuning
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.peft import is_peft_folder, load_peft
from mllm4d_jax.models.qwen_vl import QwenVL, vision_geometry
from mllm4d_jax.models.split import attach_lora, needs_adapter, split_model, trained
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.place import placed
from mllm4d_jax.parallel.rules import parameter_sharding
from mllm4d_jax.qa.system_prompt import resolve_system_prompt
from mllm4d_jax.rows.shape import RowShape
from mllm4d_jax.run.fitting import remat_of
from mllm4d_jax.run.optimizer import init_optimizer, learning_rates, make_optimizer, optimizer_placement


class BuildError(ValueError):
    """The config names no model or no records to build from."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model split into what is trained and what is not, with its optimiser; arrays, or shapes with shardings.

    Attributes:
      config: of the run.
      sizes: of the model.
      mesh: its devices.
      graphdef: its structure; `trainable`, `frozen`: its trees, see `models.split.split_model`.
      optimizer, opt_state: of the trainable tree.
      rates: f32[steps] learning rate of every step.
      shape: of the task's rows.
      tuning: what the FLOPs of a step depend on besides its batch.
    """

    config: ml_collections.ConfigDict
    sizes: ModelConfig
    mesh: Mesh
    graphdef: nnx.GraphDef
    trainable: Any
    frozen: Any
    optimizer: optax.GradientTransformation
    opt_state: Any
    rates: np.ndarray
    shape: RowShape
    tuning: Tuning


def build(
    config: ml_collections.ConfigDict, *, devices: Sequence[jax.Device] | None = None, abstract: bool = False
) -> Parts:
    """Build the model and optimiser of a training run: base weights, a PEFT adapter or a fresh one, and fresh moments.

    Args:
      config: of the "sft" or "grpo" task.
      devices: None for all there are.
      abstract: shapes instead of arrays; no weights are read, and no file but config.json (none for a published size).

    Raises:
      BuildError: no model is named.
      MeshError, ModelConfigError, CheckpointError, PeftError, TrainableError, ProcessorError, RowShapeError,
        LoaderError: what cannot be built.
    """
    mesh = make_mesh(dict(config.mesh), devices)
    model = abstract_model(config, model_sizes(config), mesh) if abstract else load_trainable(config, mesh)
    graphdef, trainable, frozen = split_model(model, tuple(config.train.trainable))
    o, iterations = config.optim, config.objective.iterations if config.task == "grpo" else 1
    rates = learning_rates(o.lr, config.train.steps, o.warmup_ratio, o.schedule)
    settings = {name: o[name] for name in ("name", "b1", "b2", "eps", "weight_decay", "clip_norm")}
    optimizer = make_optimizer(np.repeat(rates, iterations), **settings)
    if abstract:
        places = optimizer_placement(optimizer, trainable, mesh)
        opt_state = jax.tree.map(placed, jax.eval_shape(optimizer.init, trainable), places)
    else:
        opt_state = init_optimizer(optimizer, trainable, mesh)
    shape = row_shape(config, processor_of(config), model.config)
    trees = graphdef, trainable, frozen, optimizer, opt_state
    return Parts(config, model.config, mesh, *trees, rates, shape, tuning(config, model, trainable))


def model_sizes(config: ml_collections.ConfigDict) -> ModelConfig:
    """Return the sizes of the model that `model.path` names, or else `model.published`, without its weights.

    Raises:
      BuildError: neither names one, or both do and it is not the same.
      ModelConfigError: its config.json cannot be run exactly.
    """
    if config.model.path:
        require_published(config)
        sizes = ModelConfig.from_folder(config.model.path)
        # Without weights it cannot be seen whether there is a head of its own; the larger case is planned.
        return dataclasses.replace(sizes, tied=bool(sizes.tied))
    if config.model.published:
        return _published_sizes(config)
    raise BuildError(
        "no model is named: --config.model.path=DIR with a config.json, or for a plan a published size "
        "(--config.model.published=8b)"
    )


def require_published(config: ml_collections.ConfigDict) -> None:
    """Compare the model in `model.path` with the published one that `model.published` names, where both are named.

    Raises:
      BuildError: it has other dimensions; the message names them.
      ModelConfigError: its config.json cannot be run exactly.
    """
    path, name = config.model.path, config.model.published
    if not path or not name:
        return
    here, there = (_dimensions(sizes) for sizes in (ModelConfig.from_folder(path), _published_sizes(config)))
    odd = [f"{key} {here[key]} instead of {value}" for key, value in there.items() if here[key] != value]
    if odd:
        raise BuildError(
            f"model.path = {path} is not the model of model.published = {name} ({SIZES[name].repository}): it has "
            f"{', '.join(odd)}. Name the folder of that one, or with --config.model.published= leave it to the folder"
        )


def _published_sizes(config: ml_collections.ConfigDict) -> ModelConfig:
    return ModelConfig.from_dict(published_config(config.model.published), config.model.published)


def _dimensions(sizes: ModelConfig) -> dict[str, Any]:
    """Return what tells models of the published sizes apart; what a fine-tuned one may have changed is not among it."""
    text, vision = sizes.text, sizes.vision
    found = {name: getattr(text, name) for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads")}
    found |= {"intermediate_size": text.intermediate_size, "vision depth": vision.depth}
    return {"model_type": sizes.model_type, **found, "experts": text.moe.num_experts if text.moe else 0}


def processor_of(config: ml_collections.ConfigDict) -> ProcessorConfig:
    """Return the processor of the model that the config names; as released for a published size without a folder."""
    if config.model.path:
        return ProcessorConfig.from_folder(config.model.path, config.model.chat_template)
    return ProcessorConfig.of(published_config(config.model.published), config.model.published)


def encoder_of(
    folder: str | Path,
    video: Mapping[str, Any],
    max_tokens: int | None = None,
    kind: Callable[..., Encoder] = Encoder,
    chat_template: str = "auto",
) -> Encoder:
    """Return what encodes records for the model in a folder; its decoder processes have to be closed.

    Args:
      video: config group of `VideoOptions`; max_tokens: see `Encoder`; kind: the class, or a subclass's constructor.
      chat_template: form of the prompts, see `chat_template.chat_form`.

    Raises:
      ModelConfigError, ProcessorError: files of the folder that cannot be used.
      BuildError: the vision tower takes something else than the RGB frames that are made here.
    """
    channels = ModelConfig.from_folder(folder).vision.in_channels
    if channels != 3:
        raise BuildError(f"{folder}: vision_config in_channels is {channels}, and frames and images are made into 3")
    options = VideoOptions.from_mapping(video)
    processor = ProcessorConfig.from_folder(folder, chat_template)
    return kind(processor, Tokenizer.from_folder(folder), options, max_tokens)


def row_shape(config: ml_collections.ConfigDict, processor: ProcessorConfig, sizes: ModelConfig) -> RowShape:
    """Return the shape of a task's rows, the same for its run and its plan.

    A row of fine-tuning is about as many clips as `data.rows` makes it, each with its questions as branches; a row of
    evaluation is about one clip; prompts of reinforcement learning are prefixes, with completions for branches.
    """
    clips = branches = 1
    lengths = config.rollout.buckets if config.task == "grpo" else config.data.branch_buckets
    if config.task == "sft":
        options = loader_options(config)
        clips, branches = options.clips_per_row, options.questions_per_video
    elif config.task == "eval":
        branches = config.questions_per_video
    return RowShape.of(
        processor,
        vision_geometry(sizes),
        VideoOptions.from_mapping(config.video),
        prefix_lengths=config.data.prefix_buckets,
        branch_lengths=lengths,
        clips=clips,
        branches=branches,
    )


def loader_options(config: ml_collections.ConfigDict) -> LoaderOptions:
    """Return what a micro-batch of fine-tuning holds. Raises LoaderError where it cannot be divided."""
    batch, parts = config.train.batch_size, config.train.accumulation
    if batch % parts:
        raise LoaderError(
            f"train.batch_size = {batch} cannot be divided into train.accumulation = {parts} micro-batches"
        )
    options = LoaderOptions.from_mapping(config.data, batch // parts)
    options.local(1)
    return options


def system_prompt(config: ml_collections.ConfigDict) -> str:
    """Return the prompt for records that bring none, '' for no prompt."""
    return resolve_system_prompt(config.prompt.system, config.prompt.system_file) or ""


def open_records(config: ml_collections.ConfigDict) -> Mixture:
    """Open what `data.mixture` names, or `data.path` when it names nothing. Raises BuildError without records there."""
    try:
        return open_mixture(config.data.path, config.data.root, tuple(config.data.mixture), system_prompt(config))
    except RecordFileError as error:
        raise BuildError(f"no training records: {error}") from error


def open_held_out(config: ml_collections.ConfigDict, path: str, root: str) -> RecordSource:
    """Open held-out records; without a root their media are where those of training are.

    Raises:
      BuildError: there are no records there.
    """
    try:
        return open_mixture(path, root or config.data.root, (), system_prompt(config)).sources[0]
    except RecordFileError as error:
        raise BuildError(f"no held-out records: {error}") from error


def load_trainable(config: ml_collections.ConfigDict, mesh: Mesh) -> QwenVL:
    """Load the base model, with an adapter if one is to be trained: that of a PEFT folder, or a fresh one."""
    model = load_model(
        config.model.path,
        dtype=jnp.dtype(config.model.dtype),
        mesh=mesh,
        attention=config.model.attention,
        remat=remat_of(config.model.remat, mesh),
    )
    model.vision_remat = config.model.vision_remat
    if needs_adapter(config.train.trainable):
        _attach(config, model, nnx.Rngs(config.seed), mesh)
        if is_peft_folder(config.model.adapter):
            load_peft(config.model.adapter, model)
    return model


def abstract_model(config: ml_collections.ConfigDict, sizes: ModelConfig, mesh: Mesh) -> QwenVL:
    """Return the model of `load_trainable` as shapes placed on `mesh`."""
    settings = config.model

    def make() -> QwenVL:
        rngs = nnx.Rngs(0)
        model = QwenVL(
            sizes,
            dtype=jnp.dtype(settings.dtype),
            mesh=mesh,
            rngs=rngs,
            attention=settings.attention,
            remat=remat_of(settings.remat, mesh),
            vision_remat=settings.vision_remat,
        )
        if needs_adapter(config.train.trainable):
            _attach(config, model, rngs, None)
        return model

    graphdef, state = nnx.split(nnx.eval_shape(make))
    shapes = []
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        sharding = parameter_sharding(variable.get_metadata("logical_axes"), value.shape, mesh)
        shapes.append((path, variable.replace(placed(value, sharding))))
    return nnx.merge(graphdef, nnx.from_flat_state(shapes))


def _attach(config: ml_collections.ConfigDict, model: QwenVL, rngs: nnx.Rngs, mesh: Mesh | None) -> None:
    c = config.lora
    attach_lora(
        model,
        rank=c.rank,
        alpha=c.alpha,
        targets=c.targets,
        dropout=c.get("dropout", 0.0),  # reinforcement learning has none
        rngs=rngs,
        mesh=mesh,
    )


def tuning(config: ml_collections.ConfigDict, model: QwenVL, trainable: Mapping[str, Any]) -> Tuning:
    """Return what the FLOPs of a step depend on besides its batch; `trainable`: the tree of what is trained."""
    return Tuning(
        rank=config.lora.rank if needs_adapter(config.train.trainable) else 0,
        targets=tuple(config.lora.targets),
        text=trained("text/stacks/0/mlp/down_proj/kernel", tuple(config.train.trainable)),
        vision="blocks" in trainable.get("vision", {}),
        remat=model.remat,
        vision_remat=config.model.vision_remat,
        attention=str(model.backend),
    )
