"""Checkpoints in Hugging Face format: load tensor by tensor into the right dtype and shards, save as published.

Loading never holds more than one stacked parameter on the host beside what already sits on the devices, and reads, for
a sharded parameter, only the slices this process needs.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file
from tqdm import tqdm

from mllm4d_jax.models import weight_map
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.weight_map import EXPERTS, HEAD, Leaf
from mllm4d_jax.parallel.rules import parameter_sharding

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ROWS = 1 << 14  # rows of a matrix compared at a time
_LISTED = 12  # offending tensors shown per kind in an error


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded exactly. The message lists everything that is wrong with it."""


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """Index of a checkpoint's tensors."""

    folder: pathlib.Path
    location: Mapping[str, str]  # tensor name -> file name
    shapes: Mapping[str, tuple[int, ...]]  # tensor name -> stored shape
    dtypes: Mapping[str, str]  # tensor name -> safetensors dtype name

    @classmethod
    def scan(cls, folder: str | pathlib.Path) -> TensorFiles:
        """Reads the headers of `model.safetensors` or of all shards named by `model.safetensors.index.json`.

        Raises:
          CheckpointError: no weights, a missing or damaged file, or an index that disagrees with its shards.
        """
        folder = pathlib.Path(folder)
        expected = _expected_locations(folder)
        location, shapes, dtypes, problems = {}, {}, {}, []
        for file in sorted(set(expected.values())) if expected else [_SINGLE]:
            try:
                with safetensors.safe_open(folder / file, "np") as f:
                    for name in f.keys():
                        part = f.get_slice(name)
                        if name in location:
                            problems.append(f"tensor {name} is in both {location[name]} and {file}")
                        location[name], shapes[name], dtypes[name] = file, tuple(part.get_shape()), part.get_dtype()
            except FileNotFoundError:
                problems.append(f"{file} is missing")
            except safetensors.SafetensorError as e:
                problems.append(f"{file} is damaged or cut short ({e})")
        if expected and not problems:
            problems += [
                f"{n} is not in {f}, where the index puts it" for n, f in expected.items() if location.get(n) != f
            ]
            problems += [f"{n} in {f} is not in the index" for n, f in location.items() if n not in expected]
        if problems:
            raise CheckpointError(f"{folder}: " + "; ".join(problems[:_LISTED]) + ". Download the checkpoint again.")
        return cls(folder, location, shapes, dtypes)

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        """One tensor, or the part `index` (a tuple of slices) of it, copied out of the file."""
        with safetensors.safe_open(self.folder / self.location[name], "np") as f:
            return f.get_slice(name)[index] if index else f.get_tensor(name)


def _expected_locations(folder: pathlib.Path) -> dict[str, str]:
    """weight_map of a sharded checkpoint, {} for a single file."""
    if (folder / _INDEX).is_file():
        try:
            found = json.loads((folder / _INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise CheckpointError(f"{folder / _INDEX} is not a safetensors index: {e!r}") from e
        # A shard name is a plain file of this folder: an index must not be able to point elsewhere.
        outside = sorted({f for f in found.values() if pathlib.PurePath(f).name != f})
        if outside:
            raise CheckpointError(f"{folder / _INDEX} names files outside the folder: {outside[:_LISTED]}")
        return found
    if not (folder / _SINGLE).is_file():
        raise CheckpointError(f"{folder} holds neither {_SINGLE} nor {_INDEX}: download the model's weights into it")
    return {}


def load_model(
    path: str | pathlib.Path, *, dtype=None, mesh: Mesh | None = None, attention: str = "auto", remat: str = "none"
) -> QwenVL:
    """Loads a model from a folder in Hugging Face format.

    Args:
      path: folder with config.json and safetensors, single-file or sharded.
      dtype: parameter and activation dtype; None keeps the dtype named by config.json.
      mesh: places every parameter by `parallel.rules`; None puts all on the default device.
      attention, remat: see `QwenVL`.

    Raises:
      ModelConfigError: config.json cannot be run exactly.
      CheckpointError: missing, unexpected or misshapen tensors (all of them in one message), or damaged files.
    """
    config = ModelConfig.from_folder(path)
    files = TensorFiles.scan(path)
    config, files = _resolve_tying(config, files)
    dtype = jnp.dtype(dtype or config.dtype)
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
    if b not in files.location or files.shapes[a] != files.shapes[b]:
        return False
    count = files.shapes[a][0]
    blocks = (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))
    return all(np.array_equal(files.read(a, (rows,)), files.read(b, (rows,))) for rows in blocks)


def _check(files: TensorFiles, table: Sequence[Leaf]) -> set[tuple]:
    """Verify names and shapes; return `transposed_experts`."""
    wanted = {name: leaf for leaf in table for name in leaf.names}
    swapped, misshapen = transposed_experts(files, table), []
    for name, leaf in wanted.items():
        shape = files.shapes.get(name)
        want = _swap(leaf.published) if leaf.path in swapped else leaf.published
        if shape is not None and shape != want:
            misshapen.append(f"{name} {list(shape)}, expected {list(want)}")
    missing, unexpected = set(wanted) - set(files.location), set(files.location) - set(wanted)
    problems = counted({"missing": missing, "unexpected": unexpected, "misshapen": misshapen})
    if problems:
        raise CheckpointError(
            f"{files.folder}: tensors do not match config.json. {'; '.join(problems)}. "
            "Is this the right config.json for these weights, and is the download complete?"
        )
    return swapped


def counted(offending: Mapping[str, Collection[str]]) -> list[str]:
    """Return "3 KIND: a, b, c" for every kind of tensors that there are, the first names of each."""
    return [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:_LISTED])}{' ...' if len(names) > _LISTED else ''}"
        for kind, names in offending.items()
        if names
    ]


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


def _load_leaf(leaf: Leaf, files: TensorFiles, dtype, mesh: Mesh | None, swapped: bool) -> jax.Array:
    """Assembles one parameter from its tensors, shard by shard when there is a mesh."""

    def assemble(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
        single = index[1:] if leaf.stacked else index
        names = leaf.names[index[0]] if leaf.stacked else leaf.names
        out = np.empty((len(names), *(s.stop - s.start for s in single)), dtype)
        for row, name in zip(out, names, strict=True):
            row[...] = _read_part(leaf, files, name, single, swapped)
        return out if leaf.stacked else out[0]

    if mesh is None:
        return jnp.asarray(assemble(tuple(slice(None) for _ in leaf.shape)))
    sharding = parameter_sharding(leaf.axes, leaf.shape, mesh)
    cached: dict[str, np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in cached:  # replicas of one shard are read once
            cached[str(index)] = assemble(index)
        return cached[str(index)]

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _read_part(leaf: Leaf, files: TensorFiles, name: str, single: tuple[slice, ...], swapped: bool) -> np.ndarray:
    """The part `single` (in our layout) of one stored tensor."""
    if leaf.layout == weight_map.CONV:
        return leaf.to_ours(files.read(name))[single]
    reverse = leaf.layout == weight_map.TRANSPOSE or swapped
    index = (*single[:-2], single[-1], single[-2]) if reverse else single
    part = files.read(name, index)
    return np.swapaxes(part, -1, -2) if reverse else part


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
    for old in [*folder.glob("model*.safetensors"), folder / _INDEX]:
        old.unlink(missing_ok=True)
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
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors({name: tensor(name) for name in names}, folder / file)
        weights |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weights}
        (folder / _INDEX).write_text(json.dumps(index, indent=1))


def write_tensors(tensors: Mapping[str, np.ndarray], file: pathlib.Path) -> None:
    """Write a safetensors file with the rights of an ordinary new file; the library's own mode is owner-only."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def _config_of(model: QwenVL) -> dict:
    """The config.json the model came from; its dtype keys and `tie_word_embeddings` say what the files now hold."""
    config, dtype = json.loads(model.config.source), str(jnp.dtype(model.text.embed.dtype))
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part |= {k: dtype for k in ("dtype", "torch_dtype") if k in part}
    return config | {"tie_word_embeddings": model.lm_head is None}
