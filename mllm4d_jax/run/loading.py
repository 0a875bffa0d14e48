"""The model that an evaluation asks: a Hugging Face folder, with a PEFT adapter or what a run has trained on top."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.peft import CONFIG, is_peft_folder
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.parallel.rules import parameter_sharding
from mllm4d_jax.run.checkpoint import start_folder
from mllm4d_jax.run.preflight import model_digest
from mllm4d_jax.run.source import Source, find_source, load_tuned


class ModelError(ValueError):
    """`model.path` and `model.adapter` do not name a model."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which model.

    Attributes:
      base: Hugging Face folder.
      source: of what was trained on top; None for the base model alone.
    """

    base: Path
    source: Source | None

    def identity(self) -> dict[str, Any]:
        """What tells it from other models, as JSON values; moving the base folder does not change it."""
        found: dict[str, Any] = {"base": model_digest(self.base), "adapter": "", "step": -1}
        if self.source is None:
            return found
        if self.source.meta is None:
            sha = hashlib.sha256()
            for file in sorted(p for p in self.source.folder.iterdir() if p.name.startswith("adapter_")):
                sha.update(file.name.encode() + file.read_bytes())
            return found | {"adapter": sha.hexdigest()}
        return found | {"adapter": str(self.source.folder), "step": self.source.step}

    def __str__(self) -> str:
        if self.source is None:
            return str(self.base)
        step = "" if self.source.step is None else f", step {self.source.step}"
        return f"{self.base} with {self.source.folder}{step}"


def choose_model(config: ml_collections.ConfigDict) -> Choice:
    """What `model.path`, `model.adapter` and `model.step` name; opens nothing large.

    Raises:
      ModelError: a folder that is no model, or an adapter that is none.
      ExportError: the checkpoints have no such step or were trained on another base model.
    """
    path, adapter = config.model.path, config.model.adapter
    if adapter:
        if start_folder(adapter) is None and not is_peft_folder(adapter):
            raise ModelError(
                f"model.adapter = {adapter} holds neither checkpoints nor {CONFIG}: name the workdir of a run, its "
                "checkpoints folder, or a PEFT folder"
            )
        wanted = {"source": adapter, "step": config.model.step, "model": {"path": path}}
        source = find_source(ml_collections.ConfigDict(wanted))
        return Choice(source.base, source)
    if config.model.step >= 0:
        raise ModelError(
            f"model.step = {config.model.step} without model.adapter: only checkpoints of a run have steps"
        )
    if not (Path(path) / "config.json").is_file() or start_folder(path) is not None:
        hint = "; what a run has trained is named with --config.model.adapter=DIR" if start_folder(path) else ""
        raise ModelError(f"model.path = {path!r} is not a model folder in Hugging Face format{hint}")
    return Choice(Path(path), None)


def load_chosen(choice: Choice, *, dtype: str, attention: str, mesh: Mesh) -> QwenVL:
    """The model on its mesh.

    Raises:
      ConfigError, CheckpointError, PeftError, ResumeError: files that cannot be used.
    """
    model = load_model(choice.base, dtype=jnp.dtype(dtype), attention=attention, mesh=mesh)
    if choice.source is None:
        return model
    model = load_tuned(model, choice.source).model
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.LoRAParam):  # restored on one device
            value = node.get_value()
            place = parameter_sharding(node.get_metadata("logical_axes"), value.shape, mesh)
            node.set_value(jax.device_put(value, place))
    return model
