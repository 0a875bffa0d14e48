"""A wider copy of a model: more inner neurons and attention heads, which at first change nothing.

What is new reads at random and is not read by anything yet (zero columns of the projection behind it), so that the copy
computes what the model computes, and fine-tuning has more to learn with: a small model that knows something becomes a
larger one without learning it again (Net2WiderNet, arXiv 1511.05641, by zeros instead of by copies).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.export.merged import COMPANIONS, DTYPES, ModelExportError
from mllm4d_jax.files.remote import bring
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import save_model
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.tensor_files import TensorFiles

# What grows of the decoder. Heads of keys and values stay, and in Qwen2.5-VL those of queries: its format has no head
# size, and takes it from their number.
_GROWING: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qwen3_vl": ("num_attention_heads", "intermediate_size"), "qwen2_5_vl": ("intermediate_size",)}
)


def write_wider(model: QwenVL, files: TensorFiles, out: pathlib.Path, factor: int, seed: int) -> None:
    """Write a copy of a model whose decoder has `factor` times as many inner neurons, and heads of queries (Qwen3-VL).

    Args:
      model: without adapters.
      files: it was loaded from; the copy is stored in their dtype.
      out: an existing empty folder; gets what else belongs to the model, too.
      factor: at least 2.
      seed: of the new weights.

    Raises:
      ModelExportError: a sparse model, or weights that are not all stored in one dtype of 16 or 32 bits.
    """
    dtypes = {files.dtypes[name] for name in files.location}
    if model.config.text.moe or len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        raise ModelExportError(
            f"{files.folder} cannot be made wider: supported are dense models in one of {', '.join(DTYPES)}"
        )
    config, dtype = _wider_config(model.config, factor), DTYPES[dtypes.pop()]
    wide = nnx.eval_shape(lambda: QwenVL(config, dtype=dtype, attention="xla", rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(wide)
    known, rng = dict(nnx.to_flat_state(nnx.state(model))), np.random.default_rng(seed)
    groups = model.config.text.num_kv_heads
    filled = [(path, leaf.replace(_grown(known[path], leaf, groups, rng))) for path, leaf in nnx.to_flat_state(shapes)]
    for name in COMPANIONS:
        if (files.folder / name).is_file():
            bring(files.folder / name, out / name)
    save_model(nnx.merge(graphdef, nnx.from_flat_state(filled)), out)


def _wider_config(config: ModelConfig, factor: int) -> ModelConfig:
    """Return the wider sizes; whether the head is tied stays as the stored tensors have decided it."""
    raw = json.loads(config.source)
    decoder = raw.get("text_config", raw)
    decoder |= {name: decoder[name] * factor for name in _GROWING[config.family]}
    if config.family == "qwen3_vl":
        decoder["head_dim"] = config.text.head_dim
    return dataclasses.replace(ModelConfig.from_dict(raw), tied=config.tied)


def _grown(known: nnx.Variable, wanted: nnx.Variable, groups: int, rng: np.random.Generator) -> jnp.ndarray:
    """The values of a parameter with its one dimension that is larger filled up.

    Heads of queries are grouped by the head of keys that serves them, so every group is filled up by itself.
    """
    values, shape = np.asarray(known.get_value(), np.float32), wanted.get_value().shape
    odd = [dim for dim, (a, b) in enumerate(zip(values.shape, shape, strict=True)) if a != b]
    if odd:
        (dim,) = odd
        parts = groups if wanted.get_metadata()["logical_axes"][dim] == "heads" else 1
        values = np.moveaxis(values, dim, -1)
        values = values.reshape(*values.shape[:-1], parts, -1)
        more = (*values.shape[:-1], shape[dim] // parts - values.shape[-1])
        # Where the last dimension grows, more is read: at random. Where another one does, nothing is made of it yet.
        new = rng.normal(scale=values.std(), size=more) if dim == len(shape) - 1 else np.zeros(more)
        values = np.concatenate([values, new], -1).reshape(*values.shape[:-2], shape[dim])
        values = np.moveaxis(values, -1, dim)
    return jnp.asarray(values, wanted.get_value().dtype)
