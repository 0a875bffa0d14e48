"""Checks before a run begins: all that is missing or impossible in one error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import jax
import ml_collections

from configs.published import PAPER, SIZES
from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.data.sources import named_set, parse_mixture
from mllm4d_jax.data.stream import LoaderError
from mllm4d_jax.files.remote import is_file, is_folder, place
from mllm4d_jax.models.config import ModelConfigError
from mllm4d_jax.models.split import needs_adapter
from mllm4d_jax.parallel.mesh import MeshError, make_mesh, rows_divide
from mllm4d_jax.parallel.rules import batch_shards
from mllm4d_jax.qa.errors import ProcessorError
from mllm4d_jax.qa.system_prompt import resolve_system_prompt
from mllm4d_jax.run.build import BuildError, loader_options, require_published
from mllm4d_jax.run.start import StartError, checkpoint_folder, find_adapter


class PreflightError(ValueError):
    """Something a run needs is missing; the message lists everything."""


def check(config: ml_collections.ConfigDict) -> None:
    """Look for everything a run of fine-tuning needs. Raises PreflightError."""
    refuse(config, [*_setting_problems(config), *_division_problems(config)])


def refuse(config: ml_collections.ConfigDict, own: Sequence[str]) -> None:
    """Look for what a training run of any task needs.

    Args:
      own: what its own task has found to be missing or impossible.

    Raises:
      PreflightError: one line per missing or impossible thing, each with what to do about it.
    """
    problems = [*_model_problems(config), *data_problems(config), *_prompt_problems(config), *own]
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise PreflightError(
            f"this run cannot start yet:\n{listed}\nTo see the whole path work without any download: python run.py "
            "--config=configs/sft.py:tiny, then configs/cold_start.py:tiny, then configs/grpo.py:tiny"
        )


def _model_problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    """What is wrong with the base model and the adapter to start from, one line each."""
    base = SIZES[config.model.published or PAPER].repository
    local = f"weights/{base.split('/')[1]}"
    fetch = f"`hf download {base} --local-dir {local}` (pip install huggingface_hub), then --config.model.path={local}"
    folder = place(config.model.path)
    if not config.model.path:
        yield f"no base model (model.path is not set): {fetch}"
    elif not folder.is_dir():
        yield f"model.path = {folder} is not a folder: {fetch}"
    else:
        missing = [n for n in ("config.json", "tokenizer.json") if not (folder / n).is_file()]
        if not any(folder.glob("*.safetensors")):
            missing.append("*.safetensors")
        if missing:
            yield f"model.path = {folder} lacks {', '.join(missing)}: is the download complete? {fetch}"
        if "config.json" not in missing:
            try:
                require_published(config)
            except (BuildError, ModelConfigError) as error:
                yield str(error)
    try:
        # A run that goes on has all it needs of the adapter in its own workdir.
        begun = config.workdir and checkpoint_folder(config.workdir)
        adapter = None if begun else find_adapter(config.model.adapter, config.model.step)
    except StartError as error:
        yield str(error)
    else:
        if adapter is not None and adapter.meta is None and not needs_adapter(config.train.trainable):
            yield "model.adapter is a PEFT adapter, but train.trainable does not train one: add 'lora' to it"


def data_problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    """What is wrong with the places that records and media should come from, one line each."""
    layout = (
        '{"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>..."}, {"from": "gpt", "value": "B"}]}'
    )
    try:
        parts = parse_mixture(config.data.mixture)
    except RecordFileError as error:
        yield str(error)
        return
    if parts:
        for part in parts:
            yield from place_problems("data.mixture:", part.path, part.root)
        return
    if not config.data.path:
        yield (
            "no training records (data.path is not set): --config.data.path=FILE, MLLM4D-2M.json or a JSON list or "
            f"JSONL file of your own with records like {layout}, and --config.data.root=DIR, the folder of their media"
        )
    yield from place_problems("data.path =", config.data.path, config.data.root)


def place_problems(name: str, path: str, root: str) -> Iterator[str]:
    """Yield what is wrong with a place of records and with their media folder, one line each; no path, no line."""
    if path and not (is_file(path) or _is_clip_set(path)):
        yield f"{name} {path} is not a file of records, nor the folder of a TFDS set"
    if path and not root and not _is_clip_set(path):
        yield f"{name} {path} has no media folder, where its video paths start: --config.data.root=DIR, or its own root"
    if root and not is_folder(root):
        yield f"{root} is not a folder: media of {path or 'the records'} should be in it"


def _is_clip_set(path: str) -> bool:
    """Whether a path names a TFDS set that is there, with or without its split."""
    named = named_set(path)
    return named is not None and is_file(os.path.join(named[0], "features.json"))


def _prompt_problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    """What is wrong with the room for prompts, the system prompt and the optimiser, one line each."""
    yield from bucket_problems(
        "data.prefix_buckets", config.data.prefix_buckets, "data.max_tokens", config.data.max_tokens
    )
    try:
        resolve_system_prompt(config.prompt.system, config.prompt.system_file)
    except ProcessorError as error:
        yield f"prompt: {error}"
    if config.optim.clip_norm <= 0:
        yield "optim.clip_norm must be above 0: gradients are scaled down to it"


def bucket_problems(name: str, lengths: Sequence[int], longest_name: str, longest: int) -> Iterator[str]:
    """Yield what is wrong with padded lengths that have to hold up to `longest` tokens, one line each."""
    buckets = list(lengths)
    if not buckets or buckets != sorted(set(buckets)) or buckets[0] < 1:
        yield f"{name} = {buckets} must be positive, ascending and not empty"
    elif buckets[-1] < longest:
        yield (
            f"the largest of {name} is {buckets[-1]}, but {longest_name} lets through up to {longest}: add a bucket of "
            f"that size or lower {longest_name}"
        )


def _setting_problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    if config.lora.dropout >= 1:
        yield f"lora.dropout = {config.lora.dropout:g} would drop everything: it must be below 1"
    yield from bucket_problems("data.branch_buckets", config.data.branch_buckets, "", 0)
    yield from place_problems("data.eval_path =", config.data.eval_path, config.data.eval_root or config.data.root)


def _division_problems(config: ml_collections.ConfigDict) -> Iterator[str]:
    """Questions -> micro-batches -> rows -> processes and devices, each of which has to divide."""
    hosts = jax.process_count()
    try:
        mesh = make_mesh(dict(config.mesh))
    except MeshError as error:
        yield f"mesh: {error}"
        return
    if not rows_divide(mesh):
        yield f"mesh: {hosts} processes would have to share rows of a batch: make mesh.tensor smaller"
        return
    try:
        _, rows = loader_options(config).local(hosts)
    except LoaderError as error:
        yield str(error)
        return
    yield from uneven_rows(config, rows * hosts, batch_shards(mesh))


def uneven_rows(config: ml_collections.ConfigDict, rows: int, shards: int) -> Iterator[str]:
    """Yield a line if the rows of a micro-batch of fine-tuning cannot be split evenly over so many devices."""
    if rows % shards:
        batch, parts = config.train.batch_size, config.train.accumulation
        micro = f" in {parts} micro-batches" if parts > 1 else ""
        yield (
            f"train.batch_size = {batch}{micro} cannot be split over {shards} devices (mesh data x fsdp): it makes "
            f"{rows} rows"
        )
