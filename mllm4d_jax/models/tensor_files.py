"""The weights of a Hugging Face folder: which files they are in, what the headers say, and the bytes of each tensor.

Nothing of a file is believed before it was checked: an index or a header may be damaged, or made to do harm.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from mllm4d_jax.files import remote
from mllm4d_jax.files.quoting import plain
from mllm4d_jax.models import weight_map
from mllm4d_jax.models.config import ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a weight may be stored as: safetensors name -> its little-endian values. Integers, truth values and floats of 8
# bits or fewer mean nothing without the scales of the method that made them.
FLOATS: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INDEX_BYTES = 1 << 26  # the index of the largest release has 0.2 MB
_HEADER_BYTES = 1 << 17  # read at first of a file in a bucket: all of most headers
_MOST_HEADER = 100 << 20  # the library refuses larger ones
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_LISTED = 12  # offending tensors plain per kind in an error


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded exactly. The message lists everything that is wrong with it."""


class StoredTensor(NamedTuple):
    """One entry of a safetensors header: safetensors dtype name, shape, and first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """Index of a checkpoint's tensors, by the names that their family was released with."""

    folder: pathlib.Path
    location: Mapping[str, str]  # tensor name -> file name
    shapes: Mapping[str, tuple[int, ...]]  # tensor name -> stored shape
    dtypes: Mapping[str, str]  # tensor name -> safetensors dtype name
    offsets: Mapping[str, int]  # tensor name -> first byte in the file
    spelled: Mapping[str, str]  # tensor name -> its name in the file

    @classmethod
    def scan(cls, folder: str | pathlib.Path, config: ModelConfig | None = None) -> TensorFiles:
        """Read the headers of `model.safetensors`, or without one of all shards that the index names.

        This is the order of transformers: an index beside a single file is a left-over.

        Args:
          config: of the model, whose family has a name for every tensor; None leaves names as the files have them.

        Raises:
          CheckpointError: no weights, a missing or damaged file, an index that disagrees with its shards, or a tensor
            that is there twice.
        """
        folder = remote.place(folder)
        if config and (named := json.loads(config.source).get("transformers_weights")):
            raise CheckpointError(
                f"{folder / 'config.json'}: transformers_weights = {plain(repr(named))}: weights are only loaded from "
                f"{SINGLE} or its shards; rename the files and delete the key"
            )
        expected = {} if (folder / SINGLE).is_file() else _read_index(folder)
        found: dict[str, tuple[str, str, StoredTensor]] = {}  # name -> name in the file, file, entry
        problems = []
        for file in sorted(set(expected.values())) or [SINGLE]:
            try:
                header = read_header(folder / file)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for spelled, entry in header.items():
                name = weight_map.published_name(spelled, config.family) if config else spelled
                if name in found:
                    other, where, _ = found[name]
                    problems.append(
                        f"{plain(other)} in {plain(where)} and {plain(spelled)} in {plain(file)} are the same tensor"
                    )
                found[name] = (spelled, file, entry)
        if expected and not problems:
            there = {spelled: file for spelled, file, _ in found.values()}
            problems += [
                f"{plain(n)} is not in {plain(f)}, where the index puts it"
                for n, f in expected.items()
                if there.get(n) != f
            ]
            problems += [f"{plain(n)} in {plain(f)} is not in the index" for n, f in there.items() if n not in expected]
        if problems:
            raise CheckpointError(f"{folder}: {_first(problems)}. Download the checkpoint again.")
        return cls(
            folder,
            location={name: file for name, (_, file, _) in found.items()},
            shapes={name: entry.shape for name, (_, _, entry) in found.items()},
            dtypes={name: entry.dtype for name, (_, _, entry) in found.items()},
            offsets={name: entry.offset for name, (_, _, entry) in found.items()},
            spelled={name: spelled for name, (spelled, _, _) in found.items()},
        )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return one tensor, stored in one of `FLOATS`, or some of its rows: as `mapped`."""
        entry = StoredTensor(self.dtypes[name], self.shapes[name], self.offsets[name])
        return mapped(self.folder / self.location[name], entry, rows)


def mapped(file: pathlib.Path, entry: StoredTensor, rows: slice = slice(None)) -> np.ndarray:
    """Return the tensor of a header's entry, which cannot be written to: a view of the file, whose pages are read when
    they are looked at; of a file in a bucket its bytes, which are fetched now.

    Args:
      rows: of its first dimension, one after the other, if not all are wanted.
    """
    dtype = FLOATS[entry.dtype]
    if 0 in entry.shape:  # nothing to map
        return np.empty(entry.shape, dtype)[rows]
    if not remote.is_remote(file):
        whole = np.asarray(np.memmap(file, dtype, "r", offset=entry.offset, shape=entry.shape))
        return whole[rows] if entry.shape else whole
    start, stop, _ = rows.indices(entry.shape[0]) if entry.shape else (0, 1, 1)
    row = dtype.itemsize * int(np.prod(entry.shape[1:], dtype=np.int64))
    data = remote.read_range(file, entry.offset + start * row, entry.offset + stop * row)
    return np.frombuffer(data, dtype).reshape((stop - start, *entry.shape[1:]) if entry.shape else ())


def read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Return the entries of a safetensors file by tensor name, after the library has checked them against the file.

    Format: u64 length of the header, little-endian; the header, JSON with each tensor's byte range in the data; data.

    Raises:
      CheckpointError: there is no such file, or its header and size do not make sense.
    """
    try:
        if remote.is_remote(file):
            length, entries = _remote_header(file)
        elif os.path.isfile(file):  # also False for a name that no file can have
            length, entries = _header(file)
        else:
            raise CheckpointError(f"{plain(file.name)} is missing")
    except (CheckpointError, remote.RemoteError):
        raise
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{plain(file.name)} is damaged or cut short ({plain(error)})") from error
    except OSError as error:
        raise CheckpointError(f"{plain(file.name)} cannot be read ({error.strerror})") from error
    entries.pop("__metadata__", None)
    return {
        name: StoredTensor(e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in entries.items()
    }


def _header(file: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Return (bytes of the header, its entries), checked. Raises SafetensorError, ValueError, OSError."""
    with safetensors.safe_open(file, "np"), file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return length, parse_json(f.read(length))


def _remote_header(file: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Return `_header` of a file in a bucket, of which nothing else is read: the library is shown a file of the same
    size without data.

    Raises:
      CheckpointError: it is missing; and as `_header`.
    """
    try:
        size = int(remote.info(file)["size"])
    except FileNotFoundError:
        raise CheckpointError(f"{plain(file.name)} is missing") from None
    begin = remote.read_range(file, 0, min(size, _HEADER_BYTES))
    length = 8 + int.from_bytes(begin[:8], "little")
    if len(begin) < length <= min(size, _MOST_HEADER):
        begin += remote.read_range(file, len(begin), length)
    with tempfile.TemporaryDirectory() as folder:
        shell = pathlib.Path(folder) / "header.safetensors"
        shell.write_bytes(begin[:length])
        os.truncate(shell, size)
        return _header(shell)


def _read_index(folder: pathlib.Path) -> dict[str, str]:
    """Return weight_map of the index: tensor name -> shard. Raises CheckpointError without one, or for a bad one."""
    file = folder / INDEX
    if not file.is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: {_instead(folder)}")
    try:
        with file.open("rb") as opened:
            text = opened.read(_INDEX_BYTES + 1)
        if len(text) > _INDEX_BYTES:
            raise ValueError(f"more than {_INDEX_BYTES >> 20} MiB")
        index = parse_json(text)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
            raise ValueError("there is no object 'weight_map' with tensors in it")
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors index: {plain(error)}. Download the checkpoint again."
        ) from error
    # A shard is a plain file of this folder: an index must not be able to point elsewhere.
    odd = {n: f for n, f in index["weight_map"].items() if not isinstance(f, str) or not _is_plain(f)}
    if odd:
        listed = _first(f"weight_map[{plain(repr(n))}] = {plain(repr(f))}" for n, f in odd.items())
        raise CheckpointError(f"{file} names files outside the folder, or no *.safetensors files: {listed}")
    return index["weight_map"]


def _is_plain(name: str) -> bool:
    """Whether a text is the name of a safetensors file, without a folder on any system."""
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:")


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text that somebody else wrote. Raises ValueError for any that has not just one."""
    try:
        return json.loads(data, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError for a key that is there twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {plain(repr(key))} is there twice")
        found[key] = value
    return found


def _instead(folder: pathlib.Path) -> str:
    """Return what to do about a folder without weights, by what is in it."""
    names = sorted(p.name for p in folder.iterdir())
    shards = [n for n in names if _SHARD.fullmatch(n)]
    if shards:
        return f"it has shards ({_first(shards)}), but what belongs to them is in the index: download that as well"
    if "adapter_model.safetensors" in names:
        return "it has an adapter: name it by --config.model.adapter, and its base model by --config.model.path"
    pickles = [n for n in names if re.fullmatch(r"pytorch_model.*\.bin", n)]
    if pickles:
        return (
            f"it has {_first(pickles)}, pickles, which can run code when they are opened and are not read: load the "
            "model with transformers where you trust it and call save_pretrained(folder)"
        )
    return "download the model's weights into it"


def _first(texts: Iterable[str]) -> str:
    """Return the first texts in one line."""
    texts = list(texts)
    return "; ".join(texts[:_LISTED]) + ("; ..." if len(texts) > _LISTED else "")


def counted(offending: Mapping[str, Collection[str]]) -> list[str]:
    """Return "3 KIND: a, b, c" for every kind of tensors that there are, the first names of each."""
    return [
        f"{len(names)} {kind}: {', '.join(map(plain, sorted(names)[:_LISTED]))}{' ...' if len(names) > _LISTED else ''}"
        for kind, names in offending.items()
        if names
    ]


def clear_weights(folder: pathlib.Path) -> None:
    """Delete what a load of this folder would take for its weights."""
    for old in [folder / SINGLE, folder / INDEX, *(p for p in folder.iterdir() if _SHARD.fullmatch(p.name))]:
        old.unlink(missing_ok=True)
