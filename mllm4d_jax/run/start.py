"""Where weights come from, in this order:

1. the newest checkpoint of the workdir (`begin.resume_point`);
2. the earlier run that `model.adapter` names, its checkpoint of `model.step` (`start_from_run`);
3. the PEFT adapter that it names (put on the model when it is built);
4. a fresh adapter on the base model.

Evaluation, export and inference put 2 and 3 to use with `choose_model` and `load_tuned`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from configs.common import task_keys
from mllm4d_jax.files.remote import place
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.peft import CONFIG, is_peft_folder, load_peft
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.split import attach_lora, merge_model, needs_adapter, split_model
from mllm4d_jax.run import saved
from mllm4d_jax.run.checkpoint import Checkpoints, Meta, abstract, flat_config, folder_digest, model_digest, saved_meta
from mllm4d_jax.run.saved import ResumeError

_ADAPTER_LEAVES = ("lora_a", "lora_b")


class StartError(ValueError):
    """There are no weights where the config says, or they do not belong to the base model."""


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
    """What an earlier run has trained.

    Attributes:
      folder: of checkpoints, or of a PEFT adapter.
      step, meta: of the checkpoint; None for a PEFT adapter.
    """

    folder: Path
    step: int | None = None
    meta: Meta | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.step is None else f"{self.folder}, step {self.step}"


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """Which model is asked or exported.

    Attributes:
      base: Hugging Face folder.
      adapter: on top of it; None for the base model alone.
    """

    base: Path
    adapter: TrainedAdapter | None

    def identity(self) -> dict[str, Any]:
        """Return what tells the model from others, as JSON values: by content, so that folders may be moved."""
        known: dict[str, Any] = {"base": model_digest(self.base), "adapter": "", "step": -1}
        if self.adapter is None:
            return known
        folder, step = self.adapter.folder, self.adapter.step
        if step is None:
            return known | {"adapter": folder_digest(folder)}
        return known | {"adapter": folder_digest(folder / str(step) / "trainable"), "step": step}

    def __str__(self) -> str:
        return str(self.base) if self.adapter is None else f"{self.base} with {self.adapter}"


def checkpoint_folder(path: str | Path) -> Path | None:
    """Return the folder of checkpoints that a path names, itself or as the workdir around it; None without any."""
    for folder in (place(path) / "checkpoints", place(path)):
        if saved.steps(folder):
            return folder
    return None


def find_adapter(path: str, step: int = -1) -> TrainedAdapter | None:
    """Return what `model.adapter` and `model.step` name; None for no path. Opens nothing large.

    Args:
      path: workdir of a run, its folder of checkpoints, or a PEFT folder.
      step: of the checkpoint; -1 for the newest.

    Raises:
      StartError: nothing there, no such step, or a damaged checkpoint.
    """
    if not path:
        if step >= 0:
            raise StartError(f"model.step = {step} without model.adapter: only checkpoints of a run have steps")
        return None
    folder = checkpoint_folder(path)
    if folder is None:
        if not is_peft_folder(path):
            raise StartError(
                f"model.adapter = {path} holds no checkpoint and no PEFT adapter: name the workdir of a run, its "
                f"checkpoints folder, or a folder with {CONFIG}"
            )
        if step >= 0:
            raise StartError(f"model.step = {step}, but {path} is a PEFT adapter, which has no steps")
        return TrainedAdapter(place(path))
    steps = saved.steps(folder)
    if step >= 0 and step not in steps:
        raise StartError(f"model.step = {step}: {folder} holds the steps {', '.join(map(str, steps))}")
    step = step if step >= 0 else steps[-1]
    try:
        return TrainedAdapter(folder, step, _read_meta(folder / str(step)))
    except ResumeError as error:
        others = ", ".join(str(one) for one in steps if one != step)
        advice = f"; name another with model.step (others there: {others})" if others else ""
        raise StartError(f"{error}{advice}") from error


class _Told(dict):
    """What a checkpoint says; says itself what is missing there."""

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._folder = folder

    def __missing__(self, key: str) -> Any:
        raise StartError(f"{self._folder} was made by another version of this program: it does not say '{key}'")


def _read_meta(folder: Path) -> Meta:
    meta = saved_meta(folder)
    return dataclasses.replace(meta, config=_Told(folder, meta.config), content=_Told(folder, meta.content))


def choose_model(path: str, adapter: str = "", step: int = -1) -> ModelChoice:
    """Return the model that `model.path`, `model.adapter` and `model.step` name.

    Args:
      path: Hugging Face folder; '' for the base model that the adapter's run was trained on.

    Raises:
      StartError: a folder that is no model, an adapter that is none, or another base model than the adapter's.
    """
    found = find_adapter(adapter, step)
    meta = None if found is None else found.meta
    named = path or ("" if meta is None else meta.config["model.path"])
    base = place(named)
    if not (base / "config.json").is_file() or checkpoint_folder(base) is not None:
        hint = ""
        if path and checkpoint_folder(path):
            hint = "; what a run has trained is named with --config.model.adapter=DIR"
        elif adapter:
            hint = f": name the base model of {adapter} with --config.model.path=DIR"
        raise StartError(f"model.path = {named!r} is not a model folder in Hugging Face format{hint}")
    if meta is not None and model_digest(base) != meta.content["model.path"]:
        raise StartError(
            f"{base} is not the base model of {found.folder}: weights, config.json or tokenizer differ from those it "
            "was trained on; name the right folder with --config.model.path=DIR"
        )
    return ModelChoice(base, found)


@dataclasses.dataclass(frozen=True)
class TunedModel:
    """A model as it was trained.

    Attributes:
      model: with adapters, if there are any.
      trained: NNX path -> f32 value of base parameters that were trained themselves.
      dropout: of the adapter in training.
      base: name of its base model, "" when the adapter gives none.
    """

    model: QwenVL
    trained: Mapping[tuple, jax.Array]
    dropout: float = 0.0
    base: str = ""


def load_chosen(choice: ModelChoice, *, dtype: str, attention: str, mesh: Mesh | None = None) -> QwenVL:
    """Load a chosen model, with what was trained on top of it, on its mesh.

    Raises:
      ModelConfigError, CheckpointError, PeftError, ResumeError, StartError: files that cannot be used.
    """
    model = load_model(choice.base, dtype=jnp.dtype(dtype), attention=attention, mesh=mesh)
    return model if choice.adapter is None else load_tuned(model, choice.adapter).model


def load_tuned(model: QwenVL, adapter: TrainedAdapter) -> TunedModel:
    """Put what was trained into the base model; `model` itself must not be used afterwards.

    Raises:
      PeftError, ResumeError: the parameters do not fit the model.
      StartError: the checkpoint has a part of the adapter alone.
    """
    if adapter.meta is None:
        loaded = load_peft(adapter.folder, model)
        return TunedModel(model, {}, loaded.dropout, loaded.base)
    c = adapter.meta.config
    patterns = tuple(c["train.trainable"])
    if needs_adapter(patterns):
        # The run's own seed: with patterns that train one half of the adapter, the other is still as it began.
        attach_lora(
            model,
            rank=c["lora.rank"],
            alpha=c["lora.alpha"],
            targets=tuple(c["lora.targets"]),
            rngs=nnx.Rngs(c["seed"]),
            mesh=model.mesh,
        )
    graphdef, trainable, frozen = split_model(model, patterns)
    wanted = abstract(trainable)
    del model, trainable  # so that the values before training can go
    with Checkpoints(adapter.folder, keep=1, read_only=True) as earlier:
        trainable = earlier.restore_trainable(adapter.step, wanted)
    trained = {path: x for path, x in _leaves(trainable).items() if path[-1] not in _ADAPTER_LEAVES}
    frozen_half = any(path[-1] in _ADAPTER_LEAVES for path in _leaves(frozen))
    if frozen_half and c["model.adapter"]:
        raise StartError(
            f"{adapter.folder} holds one part of an adapter and the other was kept as it is in {c['model.adapter']}, "
            "which this run does not have: they cannot be put together"
        )
    return TunedModel(merge_model(graphdef, trainable, frozen), trained, float(c.get("lora.dropout", 0.0)))


def _leaves(tree: Any) -> dict[tuple, Any]:
    """NNX path -> leaf of nested dicts."""
    return {tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def start_from_run(config: ml_collections.ConfigDict, trainable: Any, content: Mapping[str, str]) -> Any:
    """Return the parameters that a new run starts from: those of the checkpoint that `model.adapter` and `model.step`
    name.

    Args:
      trainable: tree as the model was built: the result where `model.adapter` is empty or a PEFT folder, which the
        model has already; else its shapes and placement.
      content: digests of the new run.

    Raises:
      StartError: nothing there, no such step, or it was trained on another base model or as another kind of adapter.
    """
    adapter = find_adapter(config.model.adapter, config.model.step)
    if adapter is None or adapter.meta is None:
        return trainable
    stored, now = adapter.meta, flat_config(config)
    differing = [
        f"{key.name}: {stored.config.get(key.name)!r} there, {now[key.name]!r} here"
        for key in task_keys(config.task)
        if key.adapter and stored.config.get(key.name) != now[key.name]
    ]
    if stored.content.get("model.path") != content["model.path"]:
        differing.append("model.path: another base model")
    if differing:
        raise StartError(f"model.adapter: {adapter.folder} was trained otherwise: {'; '.join(differing)}")
    with Checkpoints(adapter.folder, keep=1, read_only=True) as earlier:
        return earlier.restore_trainable(adapter.step, trainable)
