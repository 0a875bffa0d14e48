"""The `export` task: what a run has trained, as a PEFT adapter or a merged checkpoint; a wider copy of a model.

The folder is written beside its place, read back and compared with the model it was made from, and only then renamed.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mllm4d_jax.export import check as export_check
from mllm4d_jax.export.check import Difference, compare
from mllm4d_jax.export.merged import ModelExportError, find_changes, write_merged
from mllm4d_jax.export.wider import write_wider
from mllm4d_jax.files.atomic import new_folder, unfinished
from mllm4d_jax.files.remote import absolute, place
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.peft import adapted_linears, load_peft, save_peft
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.tensor_files import TensorFiles
from mllm4d_jax.run.start import ModelChoice, TunedModel, choose_model, load_tuned


def export_peft(
    tuned: TunedModel, ours: np.ndarray, source: ModelChoice, out: pathlib.Path, base_name: str, tolerance: float
) -> list[str]:
    """Writes the adapter to `out`, reads it back and compares with the model's logits `ours`; returns lines to print.

    Raises:
      ModelExportError: there is no adapter, base parameters were trained as well, or the logits differ.
    """
    if tuned.trained:
        names = ["/".join(map(str, path)) for path in tuned.trained]
        raise ModelExportError(
            f"a PEFT folder holds adapters alone, but {len(names)} base parameters were trained ({names[0]}, ...): "
            "export this run with configs/export.py:merged"
        )
    model = tuned.model
    rank = next(iter(adapted_linears(model).values())).lora_a.shape[-1]
    count = save_peft(model, out, base=base_name or tuned.base or str(source.base), dropout=tuned.dropout)
    export_check.detach(model)
    load_peft(out, model)
    difference = compare(export_check.logits(model), ours)
    difference.require(tolerance, "the adapter read back is not the model's", "Please report this.")
    return [f"PEFT adapter of rank {rank}, {count} tensors", _reloaded(difference, tolerance)]


def export_merged(
    tuned: TunedModel, ours: np.ndarray, source: ModelChoice, out: pathlib.Path, tolerance: float, rounding: float
) -> list[str]:
    """Writes the merged checkpoint to `out`, loads it, compares with `ours`; returns lines to print. Uses the model up.

    What is loaded has to equal the model merged in memory and rounded to the files' dtype by `tolerance`; that one may
    differ from the model as it was trained by `rounding` (by `tolerance`, where files and comparison are float32).

    Raises:
      ModelExportError: the logits differ, or a weight cannot be stored in its dtype.
    """
    model, files = tuned.model, TensorFiles.scan(source.base, tuned.model.config)
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


def export_wider(
    model: QwenVL, ours: np.ndarray, source: ModelChoice, out: pathlib.Path, config: ml_collections.ConfigDict
) -> list[str]:
    """Writes a wider copy of the model to `out`, loads it and compares with `ours`; returns lines to print.

    Raises:
      ModelExportError: a model that cannot be made wider, or the logits differ.
    """
    text, tolerance = model.config.text, config.tol[config.model.dtype]
    write_wider(model, TensorFiles.scan(source.base, model.config), out, config.factor, config.seed)
    wide = load_model(out, dtype=model.dtype, attention=config.model.attention)
    difference = compare(export_check.logits(wide), ours)
    difference.require(tolerance, "the wider copy is not the model", "Please report this.")
    now = wide.config.text
    return [
        f"{now.num_heads} heads for {text.num_heads}, {now.intermediate_size:,} neurons for {text.intermediate_size:,}",
        _reloaded(difference, tolerance),
    ]


def _reloaded(difference: Difference, tolerance: float) -> str:
    allowed = f"(allowed {tolerance * difference.scale:.2g})"
    return f"read back and compared: logits differ by up to {difference.largest:.2g} {allowed}"


def export_tuned(
    model: QwenVL, before: np.ndarray, source: ModelChoice, out: pathlib.Path, config: ml_collections.ConfigDict
) -> list[str]:
    """Writes what was trained to `out`, in the form that `config` asks for; returns lines to print. Uses the model up.

    Raises:
      ModelExportError, PeftError, ResumeError, CheckpointError: as `export_peft` and `export_merged`.
    """
    tuned = load_tuned(model, source.adapter)
    ours = export_check.logits(tuned.model)
    effect = compare(ours, before)
    empty = not tuned.trained and export_check.is_empty(tuned.model)
    tolerance = config.tol[config.model.dtype]
    if config.form == "peft":
        lines = export_peft(tuned, ours, source, out, config.base_name, tolerance)
    else:
        lines = export_merged(tuned, ours, source, out, tolerance, config.tol.rounding)
    moved = f"what was trained moves the logits of the test prompt by up to {effect.largest:.2g}"
    if empty:
        moved += "\n  WARNING: this adapter changes nothing: in every pair of its matrices one is zero. Was it trained?"
    return [*lines, moved]


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task.

    Raises:
      ModelExportError, StartError, PeftError, ResumeError, CheckpointError: what is missing, does not fit or came out
        different; no part of an export is left then.
    """
    del workdir  # the result goes to config.output
    _check(config)
    output = place(absolute(config.output))
    if output.exists() and not unfinished(output):
        raise ModelExportError(f"config.output = {output} exists already: name another folder, or remove it first")
    source = choose_model(config.model.path, config.model.adapter, config.model.step)
    model = load_model(source.base, dtype=jnp.dtype(config.model.dtype), attention=config.model.attention)
    before = export_check.logits(model)
    export = export_wider if config.form == "wider" else export_tuned
    with new_folder(output) as folder:
        lines = export(model, before, source, folder, config)
    origin = f"from {source.adapter}; base model {source.base}" if source.adapter else f"from {source.base}"
    print(f"{output}: {lines[0]}", origin, *lines[1:], sep="\n  ")
    return 0


def _check(config: ml_collections.ConfigDict) -> None:
    """Raise ModelExportError for what no export could be made with."""
    if jax.process_count() > 1:
        raise ModelExportError("an export is the work of one process: run it with --config.distributed=off")
    if not config.output:
        raise ModelExportError("config.output is empty: name the folder to write with --config.output=DIR")
    if config.form == "wider" and config.model.adapter:
        raise ModelExportError(
            "a wider copy is made of a model alone: merge the adapter first, configs/export.py:merged"
        )
    if config.form != "wider" and not config.model.adapter:
        raise ModelExportError("model.adapter is empty: name a workdir, its checkpoints or a PEFT adapter folder")
