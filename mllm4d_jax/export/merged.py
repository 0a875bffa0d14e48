"""A checkpoint with trained weights and adapters merged in: the base model's files with some byte ranges replaced.

Every file is copied and the tensors that changed are written over in place, one at a time, so that memory holds one
tensor, and everything else (names, order, shards, index, untouched weights) stays byte for byte what it was.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mllm4d_jax.files.remote import bring
from mllm4d_jax.models import weight_map
from mllm4d_jax.models.hf import transposed_experts
from mllm4d_jax.models.peft import adapted_linears
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.tensor_files import FLOATS, INDEX, SINGLE, TensorFiles
from mllm4d_jax.models.weight_map import HEAD, Leaf

DTYPES: Mapping[str, np.dtype] = {name: FLOATS[name] for name in ("F32", "F16", "BF16")}  # what is written
# What goes along with the weights; anything else in the folder is left where it is.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json",
    "chat_template.jinja", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip

# the stored tensor -> the f32 values to put in its place, in the stored layout
Change = Callable[[np.ndarray], np.ndarray]


class ModelExportError(ValueError):
    """Something cannot be exported, or an export is not equal to the model it was made from."""


def find_changes(model: QwenVL, trained: Mapping[tuple, jax.Array], files: TensorFiles) -> dict[str, Change]:
    """Tensor name -> how it changes, for everything that was trained.

    Args:
      model: with its adapters, if any.
      trained: NNX path -> f32 value of the base parameters that were trained themselves.
      files: the base model's.
    """
    table = weight_map.leaves(model)
    linears, swapped = adapted_linears(model), transposed_experts(files, table)
    changes: dict[str, Change] = {}
    for leaf in table:
        linear = linears.get(leaf.path[:-1]) if leaf.path[-1] == "kernel" else None
        if linear is None and leaf.path not in trained:
            continue
        for layer, name in enumerate(leaf.names):
            changes[name] = _change(leaf, layer, trained.get(leaf.path), linear, leaf.path in swapped)
    embedding = weight_map.embedding_name(model.config)
    if model.lm_head is None and embedding in changes and HEAD in files.location:
        changes[HEAD] = changes[embedding]  # a tied head that is stored all the same
    return changes


def _change(leaf: Leaf, layer: int, trained, linear, swapped: bool) -> Change:
    """The change of one tensor; nothing is computed before it is called."""

    def apply(stored: np.ndarray) -> np.ndarray:
        value = stored.astype(np.float32)
        if trained is not None:
            value = leaf.to_published(np.asarray(trained[layer] if leaf.stacked else trained, np.float32))
            value = np.swapaxes(value, -1, -2) if swapped else value
        if linear is not None:
            a, b = (np.asarray(p[layer], np.float32) for p in (linear.lora_a, linear.lora_b))
            value = value + leaf.to_published(np.float32(linear.lora_scale) * (a @ b))
        return value

    return apply


def write_merged(files: TensorFiles, out: pathlib.Path, changes: Mapping[str, Change]) -> int:
    """Writes the whole checkpoint folder.

    Args:
      files: of the base model.
      out: an existing empty folder.
      changes: see `find_changes`; new values are rounded to the stored dtype once.

    Returns:
      The number of tensors that were written anew.

    Raises:
      ModelExportError: a changed tensor is stored in a dtype that cannot take it, or new values are not finite there.
    """
    odd = sorted({files.dtypes[name] for name in changes} - set(DTYPES))
    if odd:
        raise ModelExportError(
            f"{files.folder} stores weights that change as {', '.join(odd)}: known are {', '.join(DTYPES)}"
        )
    shards = sorted(set(files.location.values()))
    # An index beside a single file belongs to other weights.
    for name in [*COMPANIONS, *([] if shards == [SINGLE] else [INDEX])]:
        if (files.folder / name).is_file():
            bring(files.folder / name, out / name)
    for name in shards:
        target = out / name
        bring(files.folder / name, target)
        _replace(target, {n: c for n, c in changes.items() if files.location[n] == name}, files)
    return len(changes)


def _replace(target: pathlib.Path, changes: Mapping[str, Change], files: TensorFiles) -> None:
    """Writes changed tensors over their old bytes in a copy of one safetensors file."""
    with target.open("r+b") as f:
        for name, change in sorted(changes.items(), key=lambda item: files.offsets[item[0]]):
            dtype = DTYPES[files.dtypes[name]]
            with np.errstate(over="ignore"):  # looked for below
                value = np.ascontiguousarray(change(files.read(name)).astype(dtype))
            if not np.isfinite(value.astype(np.float32)).all():
                raise ModelExportError(f"{name} has values that are not finite in the {dtype.name} of {files.folder}")
            if value.shape != files.shapes[name]:
                raise ModelExportError(
                    f"{name} is {list(files.shapes[name])} in {files.folder}, {list(value.shape)} here"
                )
            f.seek(files.offsets[name])
            f.write(value.tobytes())
