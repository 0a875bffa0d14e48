"""What a run has trained, found and put into its base model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from flax import nnx

from mllm4d_jax.models.lora import attach_lora
from mllm4d_jax.models.peft import CONFIG, is_peft_folder, load_peft
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.split import merge_model, split_model
from mllm4d_jax.run.checkpoint import Checkpoints, Meta, start_folder
from mllm4d_jax.run.preflight import model_digest

_ADAPTER_LEAVES = ("lora_a", "lora_b")


class SourceError(ValueError):
    """What was trained cannot be found, or does not belong to the base model."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the trained parameters are.

    Attributes:
      folder: of checkpoints, or of a PEFT adapter.
      step: of the checkpoint; None for a PEFT adapter.
      meta: of the checkpoint; None for a PEFT adapter.
      base: folder of the base model.
    """

    folder: pathlib.Path
    step: int | None
    meta: Meta | None
    base: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A model as it was trained.

    Attributes:
      model: with adapters, if there are any.
      trained: NNX path -> f32 value of base parameters that were trained themselves.
      dropout: of the adapter in training.
      base: name of its base model, "" when the source gives none.
    """

    model: QwenVL
    trained: Mapping[tuple, jax.Array]
    dropout: float
    base: str


def find_source(config: ml_collections.ConfigDict) -> Source:
    """What `source`, `step` and `model.path` name.

    Raises:
      SourceError: nothing there, or another base model than the run was trained on.
    """
    if not config.source:
        raise SourceError("config.source is empty: name a workdir, its checkpoints folder or a PEFT adapter folder")
    folder = start_folder(config.source)
    if folder is None and not is_peft_folder(config.source):
        raise SourceError(f"config.source = {config.source} holds neither checkpoints nor {CONFIG}")
    if folder is None:
        if config.step >= 0:
            raise SourceError(f"config.step = {config.step}, but {config.source} is a PEFT adapter, which has no steps")
        return Source(pathlib.Path(config.source), None, None, _base_folder(config.model.path, config.source))
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    if config.step >= 0 and config.step not in steps:
        raise SourceError(f"config.step = {config.step}: {folder} holds the steps {', '.join(map(str, steps))}")
    with Checkpoints(folder, keep=1) as earlier:
        step = config.step if config.step >= 0 else earlier.latest()
        meta = earlier.meta(step)
    base = _base_folder(config.model.path or meta.config["model.path"], config.source)
    if model_digest(base) != meta.content["model.path"]:
        raise SourceError(
            f"{base} is not the base model of {folder}: weights, config.json or tokenizer differ from those it was "
            "trained on; name the right folder with --config.model.path=DIR"
        )
    return Source(folder, step, meta, base)


def _base_folder(path: str, source: str) -> pathlib.Path:
    if not path or not (pathlib.Path(path) / "config.json").is_file():
        raise SourceError(
            f"model.path = {path!r} is not the folder of a model: name the base model of {source} with "
            "--config.model.path=DIR"
        )
    return pathlib.Path(path)


def load_tuned(model: QwenVL, source: Source) -> Tuned:
    """The base model with what was trained put into it; `model` itself must not be used afterwards.

    Raises:
      PeftError, ResumeError: the parameters do not fit the model.
      SourceError: the source has a part of the adapter alone.
    """
    if source.meta is None:
        adapter = load_peft(source.folder, model)
        return Tuned(model, {}, adapter.dropout, adapter.base)
    c = source.meta.config
    patterns = tuple(c.get("train.trainable", ("lora",)))
    if any("lora" in pattern for pattern in patterns):
        # The run's own seed: with patterns that train one half of the adapter, the other is still as it began.
        rngs = nnx.Rngs(c["seed"])
        attach_lora(model, rank=c["lora.rank"], alpha=c["lora.alpha"], targets=tuple(c["lora.targets"]), rngs=rngs)
    graphdef, trainable, frozen = split_model(model, patterns)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainable)
    del model, trainable  # so that the values before training can go
    with Checkpoints(source.folder, keep=1) as earlier:
        trainable = earlier.restore_trainable(source.step, wanted)
    leaves = _paths(trainable)
    trained = {path: x for path, x in leaves.items() if path[-1] not in _ADAPTER_LEAVES}
    frozen_half = any(path[-1] in _ADAPTER_LEAVES for path in _paths(frozen))
    if frozen_half and c.get("model.adapter"):
        raise SourceError(
            f"{source.folder} holds one part of an adapter and the other was kept as it is in {c['model.adapter']}, "
            "which this run does not have: export cannot put them together"
        )
    return Tuned(merge_model(graphdef, trainable, frozen), trained, float(c.get("lora.dropout", 0.0)), "")


def _paths(tree: Any) -> dict[tuple, Any]:
    """NNX path -> leaf of nested dicts."""
    return {tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
