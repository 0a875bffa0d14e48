"""Checkpoints in Hugging Face format: load tensor by tensor into the right dtype and shards, save as published.

Loading never holds more than one stacked parameter on the host beside what already sits on the devices (where the host
is the device, nothing beside it), and reads, for a sharded parameter, only the rows this process needs, each once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file
from tqdm import tqdm

from mllm4d_jax.files.quoting import plain
from mllm4d_jax.models import weight_map
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.tensor_files import FLOATS, INDEX, SINGLE, CheckpointError, TensorFiles, clear_weights, counted
from mllm4d_jax.models.weight_map import EXPERTS, HEAD, Leaf
from mllm4d_jax.parallel.rules import parameter_sharding

Bounds = tuple[tuple[int, int], ...]  # of a shard: its begin and its end in every dimension
_ROWS = 1 << 14  # rows of a matrix compared at a time
_STRIP = 1 << 9  # rows of a matrix converted and turned at a time: few enough to stay in a processor's cache


def load_model(
    path: str | pathlib.Path, *, dtype=None, mesh: Mesh | None = None, attention: str = "auto", remat: str = "none"
) -> QwenVL:
    """Loads a model from a folder in Hugging Face format.

    Args:
      path: folder with config.json and safetensors, single-file or sharded.
      dtype: parameter and activation dtype; None keeps the dtype named by config.json, or, where that names none, the
        one the token embedding is stored in.
      mesh: places every parameter by `parallel.rules`; None puts all on the default device.
      attention, remat: see `QwenVL`.

    Raises:
      ModelConfigError: config.json cannot be run exactly.
      CheckpointError: quantised weights; missing, unexpected or misshapen tensors, or such that are not stored as
        floating-point weights (all of them in one message); damaged files.
    """
    config = ModelConfig.from_folder(path)
    files = TensorFiles.scan(path, config)
    _refuse_quantised(config, files)
    config, files = _resolve_tying(config, files)
    dtype = jnp.dtype(dtype or config.dtype or _stored_dtype(config, files))
    model = weight_map.abstract_model(config, dtype=dtype, attention=attention, remat=remat, mesh=mesh)
    table = weight_map.leaves(model)
    swapped = _check(files, table)
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    # Largest first: its host staging then meets the emptiest memory, and the peak stays near the size of the file.
    for leaf in sorted(table, key=lambda t: -int(np.prod(t.shape))):
        variable = flat[leaf.path]
        flat[leaf.path] = variable.replace(_load_leaf(leaf, files, dtype, mesh, leaf.path in swapped))
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))


def _refuse_quantised(config: ModelConfig, files: TensorFiles) -> None:
    """Raise CheckpointError where config.json says that the weights were quantised, by whatever method."""
    raw = json.loads(config.source)
    parts = [part for part in (raw, raw.get("text_config"), raw.get("vision_config")) if isinstance(part, dict)]
    for key in ("quantization_config", "compression_config", "quantization"):
        for how in filter(None, (part.get(key) for part in parts)):
            # What bitsandbytes wrote before methods had names: load_in_8bit or load_in_4bit.
            named = (
                how.get("quant_method") or [k for k, v in how.items() if v is True] if isinstance(how, dict) else how
            )
            raise CheckpointError(
                f"{files.folder / 'config.json'}: {key} = {plain(named or how)}, tensors of "
                f"{', '.join(sorted(set(files.dtypes.values())))}: quantised weights are not loaded. Take the release "
                "that is not quantised, or dequantise this one with the tools of its method and save it again; if that "
                "has been done already, delete the key from config.json"
            )


def _stored_dtype(config: ModelConfig, files: TensorFiles) -> np.dtype:
    """Return the dtype of the token embedding in the files, at most float32."""
    stored = FLOATS.get(files.dtypes.get(weight_map.embedding_name(config), ""), np.dtype(np.float32))
    return min(stored, np.dtype(np.float32), key=lambda dtype: dtype.itemsize)  # JAX has no float64 by default


def _resolve_tying(config: ModelConfig, files: TensorFiles) -> tuple[ModelConfig, TensorFiles]:
    """Decides whether the head is the embedding, and hides the stored copy of a tied head.

    A stored head that differs from the embedding wins over `tie_word_embeddings`, as in transformers 5; without the
    key, the presence of a stored head decides.
    """
    if HEAD not in files.location:
        return (config if config.tied is False else dataclasses.replace(config, tied=True)), files
    if config.tied and _equal(files, HEAD, weight_map.embedding_name(config)):
        location = {name: file for name, file in files.location.items() if name != HEAD}
        return config, dataclasses.replace(files, location=location)
    return dataclasses.replace(config, tied=False), files


def _equal(files: TensorFiles, a: str, b: str) -> bool:
    """Whether two stored matrices are the same numbers, read in blocks of rows."""
    both = (a, b)
    if b not in files.location or not {files.dtypes[n] for n in both} <= set(FLOATS):
        return False
    if files.shapes[a] != files.shapes[b] or not files.shapes[a]:
        return False
    blocks = (slice(start, start + _ROWS) for start in range(0, files.shapes[a][0], _ROWS))
    return all(np.array_equal(*(files.read(n, rows) for n in both)) for rows in blocks)


def _check(files: TensorFiles, table: Sequence[Leaf]) -> set[tuple]:
    """Verify names and shapes; return `transposed_experts`."""
    wanted = {name: leaf for leaf in table for name in leaf.names}
    swapped, misshapen = transposed_experts(files, table), []
    for name, leaf in wanted.items():
        shape = files.shapes.get(name)
        want = _swap(leaf.published) if leaf.path in swapped else leaf.published
        if shape is not None and shape != want:
            misshapen.append(f"{name} {list(shape)}, expected {list(want)}")
    missing = set(wanted) - set(files.location)
    unexpected = {files.spelled[name] for name in set(files.location) - set(wanted)}
    no_floats = [f"{files.spelled[n]} ({files.dtypes[n]})" for n in files.location if files.dtypes[n] not in FLOATS]
    offending = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        f"not stored as {', '.join(FLOATS)}, as weights are (are they quantised?)": no_floats,
    }
    problems = counted(offending)
    if problems:
        raise CheckpointError(
            f"{files.folder}: tensors do not match config.json. {'; '.join(problems)}. "
            "Is this the right config.json for these weights, and is the download complete?"
        )
    return swapped


def _swap(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def transposed_experts(files: TensorFiles, table: Sequence[Leaf]) -> set[tuple]:
    """Return the paths of expert parameters that the files hold with the last two dimensions swapped (transformers 5).

    gate_up and down of one stack are judged together: at most one of them can be square.
    """
    stacks: dict[tuple, list[Leaf]] = {}
    for leaf in table:
        if leaf.layout == EXPERTS:
            stacks.setdefault(leaf.path[:-1], []).append(leaf)
    swapped = set()
    for group in stacks.values():
        pairs = [(files.shapes.get(name), leaf.published) for leaf in group for name in leaf.names]
        if all(have == _swap(want) for have, want in pairs) and any(have != want for have, want in pairs):
            swapped |= {leaf.path for leaf in group}
    return swapped


def _load_leaf(leaf: Leaf, files: TensorFiles, dtype: np.dtype, mesh: Mesh | None, swapped: bool) -> jax.Array:
    """Assembles what this process holds of one parameter from its tensors, and waits until it is placed."""
    if mesh is None:
        whole = _bounds(tuple(slice(None) for _ in leaf.shape), leaf.shape)
        return jax.block_until_ready(jax.device_put(_assemble(leaf, files, dtype, [whole], swapped)[whole]))
    sharding = parameter_sharding(leaf.axes, leaf.shape, mesh)
    held = sharding.addressable_devices_indices_map(leaf.shape).values()
    shards = _assemble(leaf, files, dtype, {_bounds(index, leaf.shape) for index in held}, swapped)
    return jax.block_until_ready(
        jax.make_array_from_callback(leaf.shape, sharding, lambda index: shards[_bounds(index, leaf.shape)])
    )


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    """Return where a shard of an array of that shape begins and ends in every dimension."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _assemble(
    leaf: Leaf, files: TensorFiles, dtype: np.dtype, shards: Collection[Bounds], swapped: bool
) -> dict[Bounds, np.ndarray]:
    """Return distinct shards of one parameter. A row of a file is read once, however many of them it is a part of.

    Layers are never split. The stretches that shards have of a dimension are equal or apart, so that each stretch of
    rows belongs to some of the shards as a whole.
    """
    turned = swapped or leaf.layout in (weight_map.TRANSPOSE, weight_map.CONV)
    # Which dimension of one layer is the first in the file: of that one, no more than what is needed is read.
    first = 1 if turned and len(leaf.shape) - leaf.stacked == 2 else 0
    made = {shard: _empty(tuple(stop - start for start, stop in shard), dtype) for shard in shards}
    by_rows: dict[tuple[int, int], list[Bounds]] = {}
    for shard in shards:
        by_rows.setdefault(shard[first + leaf.stacked], []).append(shard)

    def fill(layer: int) -> None:
        for rows, sharing in by_rows.items():
            stored = files.read(leaf.names[layer], slice(*rows))
            stored = stored.reshape(len(stored), -1) if leaf.layout == weight_map.CONV else stored
            stored = np.swapaxes(stored, -1, -2) if turned else stored
            for shard in sharing:
                single = shard[1:] if leaf.stacked else shard
                rest = tuple(slice(None) if n == first else slice(*bounds) for n, bounds in enumerate(single))
                _copy(stored[rest], made[shard][layer] if leaf.stacked else made[shard], turned)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(len(leaf.names))))
    return made


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return zeros at the start of a page of memory, so that JAX uses them where they are if the host is the device.

    `np.empty` asks for huge pages; where memory is in pieces, the kernel spends more on making them than loading takes.
    """
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype).reshape(shape)


def _copy(source: np.ndarray, target: np.ndarray, turned: bool) -> None:
    """Do `target[...] = source`, for a source that is the transposed view of rows of memory if `turned`.

    NumPy would walk across the rows of such a view, a cache line for every value; OpenCV turns it block by block.
    """
    if source.ndim > 2:
        for one, into in zip(source, target, strict=True):
            _copy(one, into, turned)
        return
    rows, into = (source.T, target.T) if turned else (source, target)
    word = np.dtype(f"i{target.itemsize}")  # bits are moved; as bfloat16 each value would be a call
    for start in range(0, len(rows), _STRIP):
        strip = slice(start, start + _STRIP)
        part = rows[strip].astype(target.dtype, copy=False).view(word)
        if turned:
            cv2.transpose(part, dst=target[:, strip].view(word))
        else:
            into[strip].view(word)[...] = part


def save_model(model: QwenVL, path: str | pathlib.Path, *, max_shard_bytes: int = 4 << 30) -> None:
    """Writes config.json and safetensors in the published names and layouts.

    Args:
      model: a model without adapters.
      path: folder, created if needed; existing weights in it are replaced.
      max_shard_bytes: a model above this size is written as shards with an index.

    Raises:
      CheckpointError: the model carries LoRA adapters, which this format has no names for.
    """
    folder = pathlib.Path(path)
    if any(isinstance(v, nnx.LoRAParam) for _, v in nnx.to_flat_state(nnx.state(model))):
        raise CheckpointError("the model carries LoRA adapters: merge or remove them before saving a full checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    table = weight_map.leaves(model)
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    itemsize = jnp.dtype(model.text.embed.dtype).itemsize
    items = {name: (leaf, layer) for leaf in table for layer, name in enumerate(leaf.names)}
    clear_weights(folder)
    (folder / "config.json").write_text(json.dumps(_config_of(model), indent=1, sort_keys=True))

    def tensor(name: str) -> np.ndarray:
        leaf, layer = items[name]
        value = values[leaf.path].get_value()
        return leaf.to_published(np.asarray(value[layer] if leaf.stacked else value))

    sizes = {name: itemsize * int(np.prod(leaf.published)) for name, (leaf, _) in items.items()}
    write_shards(folder, sizes, tensor, max_shard_bytes)


def write_shards(
    folder: pathlib.Path, sizes: Mapping[str, int], tensor: Callable[[str], np.ndarray], max_shard_bytes: int
) -> None:
    """Write model.safetensors, or shards with an index, in the order of the names; one shard is in memory at a time.

    Args:
      folder: without weights in it.
      sizes: tensor name -> bytes.
      tensor: name -> the tensor, called once each.
      max_shard_bytes: a shard is closed before it would grow past this; one tensor may exceed it.
    """
    shards: list[list[str]] = [[]]
    for name in sorted(sizes):
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    weights: dict[str, str] = {}
    for number, names in enumerate(tqdm(shards, unit="shard", disable=None), 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors({name: tensor(name) for name in names}, folder / file)
        weights |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weights}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def write_tensors(
    tensors: Mapping[str, np.ndarray], file: pathlib.Path, about: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the rights of an ordinary new file; the library's own mode is owner-only.

    `about`: what goes into its metadata besides.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"} | dict(about or {}))
    file.chmod(mode)


def _config_of(model: QwenVL) -> dict:
    """The config.json the model came from; its dtype keys and `tie_word_embeddings` say what the files now hold."""
    config, dtype = json.loads(model.config.source), str(jnp.dtype(model.text.embed.dtype))
    said = {"dtype": dtype, "torch_dtype": dtype, "tie_word_embeddings": model.lm_head is None}
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part |= {key: value for key, value in said.items() if key in part}
    return config | {"tie_word_embeddings": said["tie_word_embeddings"]}
