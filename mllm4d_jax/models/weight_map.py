"""Names and layouts: which checkpoint tensors make each parameter of the model, for every family.

One table per family maps module paths to Hugging Face module names; the leaf kinds below say how a tensor's layout
changes. Loading and saving both read these tables, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import nnx

from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.text import run_lengths

_VISION = {
    "patch_embed": "patch_embed.proj",
    "blocks.norm1": "blocks.{i}.norm1",
    "blocks.norm2": "blocks.{i}.norm2",
    "blocks.qkv": "blocks.{i}.attn.qkv",
    "blocks.proj": "blocks.{i}.attn.proj",
}
_QWEN3_VISION = {
    **_VISION,
    "pos_embed": "pos_embed",
    "blocks.mlp.fc1": "blocks.{i}.mlp.linear_fc1",
    "blocks.mlp.fc2": "blocks.{i}.mlp.linear_fc2",
    "merger.norm": "merger.norm",
    "merger.mlp.fc1": "merger.linear_fc1",
    "merger.mlp.fc2": "merger.linear_fc2",
    "deepstack_mergers.{j}.norm": "deepstack_merger_list.{j}.norm",
    "deepstack_mergers.{j}.mlp.fc1": "deepstack_merger_list.{j}.linear_fc1",
    "deepstack_mergers.{j}.mlp.fc2": "deepstack_merger_list.{j}.linear_fc2",
}
_QWEN2_5_VISION = {
    **_VISION,
    **{f"blocks.mlp.{p}": f"blocks.{{i}}.mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
    "merger.norm": "merger.ln_q",
    "merger.mlp.fc1": "merger.mlp.0",
    "merger.mlp.fc2": "merger.mlp.2",
}
_TEXT = {
    "embed": "embed_tokens",
    "norm": "norm",
    "stacks.{j}.input_norm": "layers.{i}.input_layernorm",
    "stacks.{j}.post_norm": "layers.{i}.post_attention_layernorm",
    **{f"stacks.{{j}}.attn.{p}_proj": f"layers.{{i}}.self_attn.{p}_proj" for p in "qkvo"},
    **{f"stacks.{{j}}.attn.{p}_norm": f"layers.{{i}}.self_attn.{p}_norm" for p in "qk"},
    **{f"stacks.{{j}}.mlp.{p}": f"layers.{{i}}.mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
    "stacks.{j}.mlp.router": "layers.{i}.mlp.gate",
    "stacks.{j}.mlp.gate_up": "layers.{i}.mlp.experts.gate_up_proj",
    "stacks.{j}.mlp.down": "layers.{i}.mlp.experts.down_proj",
}
_VISION_OF = {"qwen3_vl": _QWEN3_VISION, "qwen2_5_vl": _QWEN2_5_VISION}
_PREFIX = {
    "qwen3_vl": {"vision": "model.visual.", "text": "model.language_model.", "head": "lm_head."},
    "qwen2_5_vl": {"vision": "visual.", "text": "model.", "head": "lm_head."},
}
# Every prefix that files have for a part, of any family. transformers before 4.52 wrote `visual.` and `model.` for
# Qwen2.5-VL, later versions `model.visual.` and `model.language_model.`, and the model without its head leaves `model.`
# out; servers and converters put a whole language model, head and all, below `language_model.`.
SPELLINGS = {
    "vision": ("model.visual.", "visual."),
    "text": ("model.language_model.", "language_model.model.", "language_model.", "model."),
    "head": ("lm_head.", "language_model.lm_head."),
}
HEAD = "lm_head.weight"
# How the published layout of one tensor becomes ours: as it is, [out,in] -> [in,out], [D,C,tp,p,p] -> [C*tp*p*p,D], or
# as it is (files written by transformers 5 hold the last two dimensions of experts swapped).
COPY, TRANSPOSE, CONV, EXPERTS = "copy", "transpose", "conv", "experts"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of the model and the checkpoint tensors it is made of."""

    path: tuple  # NNX path of the parameter
    shape: tuple[int, ...]  # its shape, with a leading layer dimension if `stacked`
    axes: tuple[str | None, ...]  # its logical axes
    names: tuple[str, ...]  # checkpoint tensors, one per layer if `stacked`, else one
    published: tuple[int, ...]  # shape of each of those tensors in the published layout
    layout: str  # COPY, TRANSPOSE, CONV or EXPERTS
    stacked: bool

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One checkpoint tensor in the published layout to one layer of the parameter (a view where possible)."""
        if self.layout == TRANSPOSE:
            return tensor.T
        if self.layout == CONV:
            return tensor.reshape(tensor.shape[0], -1).T
        return tensor

    def to_published(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_ours`, contiguous."""
        if self.layout in (TRANSPOSE, CONV):
            array = array.T
        return np.ascontiguousarray(array).reshape(self.published)


def abstract_model(config: ModelConfig, **kwargs) -> QwenVL:
    """The module tree with shapes instead of arrays. `kwargs` go to `QwenVL`."""
    return nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), **kwargs))


def leaves(model: QwenVL) -> list[Leaf]:
    """Every base parameter of a (possibly abstract) model with its source tensors; LoRA parameters are left out."""
    config = model.config
    return [
        _leaf(path, tuple(variable.get_value().shape), variable.get_metadata("logical_axes"), config)
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if not isinstance(variable, nnx.LoRAParam)
    ]


def embedding_name(config: ModelConfig) -> str:
    """Name of the token embedding, which a tied head shares."""
    return f"{_PREFIX[config.family]['text']}{_TEXT['embed']}.weight"


def published_name(name: str, family: str) -> str:
    """Return a tensor's name as the family was released, whichever of `SPELLINGS` it has; any other name as it is."""
    found = [
        (len(prefix), part) for part, prefixes in SPELLINGS.items() for prefix in prefixes if name.startswith(prefix)
    ]
    if not found:
        return name
    length, part = max(found)
    return _PREFIX[family][part] + name[length:]


def _leaf(path: Sequence, shape, axes, config: ModelConfig) -> Leaf:
    part, rest = path[0], list(path[1:])
    leaf_kind = rest.pop() if rest and rest[-1] in ("kernel", "bias", "scale") else ""
    numbers = [p for p in rest if isinstance(p, int)]
    key = ".".join("{j}" if isinstance(p, int) else str(p) for p in rest)
    if part == "lm_head":
        name = "lm_head"
    else:
        name = _PREFIX[config.family][part] + (_TEXT if part == "text" else _VISION_OF[config.family])[key]
    layout, suffix = COPY, ".weight"
    if leaf_kind == "bias":
        suffix = ".bias"
    elif leaf_kind == "kernel" or key.endswith(".router"):
        layout = CONV if key == "patch_embed" else TRANSPOSE
    elif ".experts." in name:
        layout, suffix = EXPERTS, ""
    stacked = "{i}" in name
    start = run_lengths(config.text)[numbers[0]][0] if stacked and part == "text" else 0
    layers = range(start, start + shape[0]) if stacked else [0]
    names = tuple(name.format(i=i, j=numbers[0] if numbers else 0) + suffix for i in layers)
    single = shape[1:] if stacked else shape
    published = single[::-1] if layout == TRANSPOSE else single
    if layout == CONV:
        v = config.vision
        published = (v.hidden_size, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    return Leaf(tuple(path), shape, tuple(axes), names, tuple(published), layout, stacked)


def published_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and published shape of every tensor of a checkpoint (no memory is allocated)."""
    model = abstract_model(config, attention="xla")
    return {name: leaf.published for leaf in leaves(model) for name in leaf.names}
