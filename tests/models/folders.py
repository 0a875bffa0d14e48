"""Model folders made out of the fixtures, and what loading a bad one says."""

from __future__ import annotations

import json
import pathlib
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mllm4d_jax.models.hf import CheckpointError, load_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NORM = "model.language_model.norm.weight"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def copied(folder: pathlib.Path, name="qwen3_vl", change=lambda values: None, **settings) -> pathlib.Path:
    """A copy of a fixture whose tensors `change` edits in place; `settings` go into config.json."""
    folder.mkdir(parents=True)
    config = json.loads((GOLDEN / name / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    values = load_file(GOLDEN / name / "model.safetensors")
    change(values)
    save_file({k: np.ascontiguousarray(v) for k, v in values.items()}, folder / "model.safetensors")
    return folder


def fill_norm(value: float):
    return lambda values: values.update({NORM: np.full_like(values[NORM], value)})


def sharded(folder: pathlib.Path, change=lambda values: None) -> pathlib.Path:
    """The same in two shards with an index."""
    file = copied(folder, change=change) / "model.safetensors"
    values = load_file(file)
    file.unlink()
    names = sorted(values)
    where = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({n: values[n] for n in names if where[n] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return folder


def norm_of(folder) -> float:
    return float(load_model(folder, attention="xla").text.norm.scale[...][0])


def refusal(folder, error=CheckpointError) -> str:
    with pytest.raises(error) as caught:
        load_model(folder)
    text = str(caught.value)
    assert text.isprintable() and text.encode() and len(text) < 5000
    return text


def whole(header, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header, JSON or to be, and data; `length`: what it says the header has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
