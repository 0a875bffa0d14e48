"""The `export` task: what a run has trained, as a PEFT adapter or as a merged Hugging Face checkpoint.

The folder is written beside its place, read back and compared with the model it was made from, and only then renamed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from mllm4d_jax.eval import export_check
from mllm4d_jax.eval.export_check import Difference, compare
from mllm4d_jax.eval.export_merged import ExportError, find_changes, write_merged
from mllm4d_jax.models.hf import TensorFiles, load_model
from mllm4d_jax.models.lora import attach_lora
from mllm4d_jax.models.peft import CONFIG, adapted_linears, is_peft_folder, load_peft, save_peft
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.train.checkpoint import Checkpoints, Meta, start_folder
from mllm4d_jax.train.preflight import model_digest
from mllm4d_jax.train.state import merge_model, split_model

_ADAPTER_LEAVES = ("lora_a", "lora_b")


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
      ExportError: nothing there, or another base model than the run was trained on.
    """
    if not config.source:
        raise ExportError("config.source is empty: name a workdir, its checkpoints folder or a PEFT adapter folder")
    folder = start_folder(config.source)
    if folder is None and not is_peft_folder(config.source):
        raise ExportError(f"config.source = {config.source} holds neither checkpoints nor {CONFIG}")
    if folder is None:
        if config.step >= 0:
            raise ExportError(f"config.step = {config.step}, but {config.source} is a PEFT adapter, which has no steps")
        return Source(pathlib.Path(config.source), None, None, _base_folder(config.model.path, config.source))
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    if config.step >= 0 and config.step not in steps:
        raise ExportError(f"config.step = {config.step}: {folder} holds the steps {', '.join(map(str, steps))}")
    with Checkpoints(folder, keep=1) as earlier:
        step = config.step if config.step >= 0 else earlier.latest()
        meta = earlier.meta(step)
    base = _base_folder(config.model.path or meta.config["model.path"], config.source)
    if model_digest(base) != meta.content["model.path"]:
        raise ExportError(
            f"{base} is not the base model of {folder}: weights, config.json or tokenizer differ from those it was "
            "trained on; name the right folder with --config.model.path=DIR"
        )
    return Source(folder, step, meta, base)


def _base_folder(path: str, source: str) -> pathlib.Path:
    if not path or not (pathlib.Path(path) / "config.json").is_file():
        raise ExportError(
            f"model.path = {path!r} is not the folder of a model: name the base model of {source} with "
            "--config.model.path=DIR"
        )
    return pathlib.Path(path)


def load_tuned(model: QwenVL, source: Source) -> Tuned:
    """The base model with what was trained put into it; `model` itself must not be used afterwards.

    Raises:
      PeftError, ResumeError: the parameters do not fit the model.
      ExportError: the source has a part of the adapter alone.
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
        raise ExportError(
            f"{source.folder} holds one part of an adapter and the other was kept as it is in {c['model.adapter']}, "
            "which this run does not have: export cannot put them together"
        )
    return Tuned(merge_model(graphdef, trainable, frozen), trained, float(c.get("lora.dropout", 0.0)), "")


def _paths(tree: Any) -> dict[tuple, Any]:
    """NNX path -> leaf of nested dicts."""
    return {tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def export_peft(tuned: Tuned, source: Source, out: pathlib.Path, base_name: str, tolerance: float) -> list[str]:
    """Writes the adapter to `out`, reads it back onto the base model and compares; returns lines for people.

    Raises:
      ExportError: there is no adapter, base parameters were trained as well, or the logits differ.
    """
    if tuned.trained:
        names = ["/".join(map(str, path)) for path in tuned.trained]
        raise ExportError(
            f"a PEFT folder holds adapters alone, but {len(names)} base parameters were trained ({names[0]}, ...): "
            "export this run with configs/export.py:merged"
        )
    model, ours = tuned.model, export_check.logits(tuned.model)
    rank = next(iter(adapted_linears(model).values())).lora_a.shape[-1]
    count = save_peft(model, out, base=base_name or tuned.base or str(source.base), dropout=tuned.dropout)
    export_check.detach(model)
    load_peft(out, model)
    difference = compare(export_check.logits(model), ours)
    difference.require(tolerance, "the adapter read back is not the model's", "Please report this.")
    return [f"PEFT adapter of rank {rank}, {count} tensors", _reloaded(difference, tolerance)]


def export_merged(tuned: Tuned, source: Source, out: pathlib.Path, tolerance: float, rounding: float) -> list[str]:
    """Writes the merged checkpoint to `out`, loads it and compares; returns lines for people. Uses the model up.

    What is loaded has to equal the model merged in memory and rounded to the files' dtype by `tolerance`; that one may
    differ from the model as it was trained by `rounding` (by `tolerance`, where files and comparison are float32).

    Raises:
      ExportError: the logits differ, or a weight cannot be stored in its dtype.
    """
    model, files = tuned.model, TensorFiles.scan(source.base)
    ours = export_check.logits(model)
    changes = find_changes(model, tuned.trained, files)
    count = write_merged(files, out, changes)
    dtypes = sorted({files.dtypes[name] for name in changes})
    export_check.merge_in_memory(model, tuned.trained, files)
    merged, dtype, attention = export_check.logits(model), model.dtype, model.backend.name
    rounded = compare(merged, ours)
    if dtypes == ["F32"] and dtype == jnp.float32:
        rounding = tolerance
    rounded.require(
        rounding,
        f"merging into {', '.join(dtypes)} changes the model",
        "Export the adapter itself (configs/export.py:peft), or raise tol.rounding if this is acceptable.",
    )
    export_check.release(model, tuned.trained)  # so that the next one is never there beside it
    difference = compare(export_check.logits(load_model(out, dtype=dtype, attention=attention)), merged)
    difference.require(tolerance, "the checkpoint read back is not the merged model", "Please report this.")
    return [
        f"merged checkpoint, {count} of {len(files.location)} tensors changed, the others byte for byte",
        _reloaded(difference, tolerance),
        f"merging and rounding to {', '.join(dtypes)}: logits move by up to {rounded.largest:.2g}",
    ]


def _reloaded(difference: Difference, tolerance: float) -> str:
    return (
        f"read back and compared: logits differ by up to {difference.largest:.2g} "
        f"(allowed {tolerance * difference.scale:.2g})"
    )


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task.

    Raises:
      ExportError, PeftError, ResumeError, CheckpointError: what is missing, does not fit or came out different; no
        part of an export is left then.
    """
    del workdir  # the result goes to config.output
    if jax.process_count() > 1:
        raise ExportError("an export is the work of one process: run it with --config.distributed=off")
    if not config.output:
        raise ExportError("config.output is empty: name the folder to write with --config.output=DIR")
    output = pathlib.Path(config.output).absolute()
    if output.exists():
        raise ExportError(f"config.output = {output} exists already: name another folder, or remove it first")
    source = find_source(config)
    model = load_model(source.base, dtype=jnp.dtype(config.dtype), attention=config.attention)
    before = export_check.logits(model)
    tuned = load_tuned(model, source)
    del model
    effect = compare(export_check.logits(tuned.model), before)
    empty = not tuned.trained and export_check.is_empty(tuned.model)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    tolerance = config.tol[config.dtype]
    try:
        if config.form == "peft":
            lines = export_peft(tuned, source, partial, config.base_name, tolerance)
        else:
            lines = export_merged(tuned, source, partial, tolerance, config.tol.rounding)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _report(output, source, lines, effect, empty)
    return 0


def _report(output: pathlib.Path, source: Source, lines: list[str], effect: Difference, empty: bool) -> None:
    step = "" if source.step is None else f", step {source.step}"
    print(f"{output}: {lines[0]}")
    print(f"  from {source.folder}{step}; base model {source.base}")
    for line in lines[1:]:
        print(f"  {line}")
    print(f"  what was trained moves the logits of the test prompt by up to {effect.largest:.2g}")
    if empty:
        print("  WARNING: this adapter changes nothing: in every pair of its matrices one is zero. Was it trained?")
