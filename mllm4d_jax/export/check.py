"""Is an export equal to the model it was made from? Logits of one small prompt, an image in it, before and after."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.export.merged import DTYPES, ModelExportError
from mllm4d_jax.models import weight_map
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.peft import adapted_linears
from mllm4d_jax.models.qwen_vl import QwenVL, text_positions, vision_geometry
from mllm4d_jax.models.tensor_files import TensorFiles
from mllm4d_jax.rows.batch import ModelInputs, collate

_SIDE = 2  # merged patches of the image along each side
_WORDS = 40  # text tokens of the prompt


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two sets of logits are apart."""

    largest: float  # largest absolute difference
    scale: float  # largest absolute logit, at least 1; tolerances are shares of it

    def require(self, tolerance: float, what: str, advice: str) -> None:
        """Raises ModelExportError above `tolerance * scale`, and for values that are not finite."""
        if not self.largest <= tolerance * self.scale:
            raise ModelExportError(
                f"{what}: logits differ by up to {self.largest:.3g}, allowed are {tolerance * self.scale:.3g} "
                f"({tolerance:g} of the largest logit, at least 1). Nothing was written. {advice}"
            )


def compare(a: np.ndarray, b: np.ndarray) -> Difference:
    """Of logits [S, V]."""
    return Difference(float(np.abs(a - b).max()), max(1.0, float(np.abs(b).max())))


def probe(config: ModelConfig) -> ModelInputs:
    """The prompt: an image of fixed noise between its markers, then ids spread over the vocabulary."""
    ids = (config.image_token_id, config.video_token_id)
    special = (*ids, config.vision_start_token_id, config.vision_end_token_id)
    words = np.linspace(0, config.text.vocab_size - 1, _WORDS).astype(np.int32)
    words = words[~np.isin(words, special)]
    image = np.full(_SIDE**2, config.image_token_id)
    tokens = np.concatenate([[config.vision_start_token_id], image, [config.vision_end_token_id], words])
    v, side = config.vision, _SIDE * config.vision.merge_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (side * side, v.patch_dim)).astype(np.float32)
    grid = Grid("image", 1, side, side)
    positions, delta = text_positions(config, tokens.astype(np.int32), [grid])
    nothing = np.zeros(len(tokens), bool)
    example = Example("probe", tokens.astype(np.int32), positions, delta, nothing, pixels, (grid,), (), "")
    return collate([example], vision_geometry(config), visual_token_ids=ids)


def logits(model: QwenVL) -> np.ndarray:
    """f32[S, V] of the prompt, with exact products whatever the device's default."""
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(graphdef, state, probe(model.config)))


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all models that are built alike
def _logits(graphdef: nnx.GraphDef, state: nnx.State, inputs: ModelInputs) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return model.logits(model(inputs))[0]


def is_empty(model: QwenVL) -> bool:
    """Whether no adapter of the model can change anything: every A or B is zero."""
    adapters = adapted_linears(model).values()
    return not any(bool(jnp.any(m.lora_b[...] != 0)) and bool(jnp.any(m.lora_a[...] != 0)) for m in adapters)


def detach(model: QwenVL) -> None:
    """Takes the adapters off, in place."""
    for linear in adapted_linears(model).values():
        linear.lora_a, linear.lora_b = nnx.data(None), nnx.data(None)
        linear.lora_scale = linear.lora_dropout = 0.0


def release(model: QwenVL, trained: Mapping[tuple, jax.Array]) -> None:
    """Gives the memory of a model's arrays back, whoever still refers to them; they must not be used afterwards."""
    for array in jax.tree.leaves((nnx.state(model), list(trained.values()))):
        if not array.is_deleted():
            array.delete()


def merge_in_memory(model: QwenVL, trained: Mapping[tuple, jax.Array], files: TensorFiles) -> None:
    """Does to the model, in place, what an export does to the files: adapters into kernels, rounded to their dtype.

    Computed apart from `export_merged`, on whole stacks in this model's layout, so that one can check the other.
    """
    stored = {leaf.path: leaf.names[0] for leaf in weight_map.leaves(model)}
    variables = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    linears = adapted_linears(model)
    for path in sorted({*trained, *((*p, "kernel") for p in linears)}, key=str):
        value = trained.get(path, variables[path].get_value())
        if path[:-1] in linears and path[-1] == "kernel":
            value = _merged(value, linears[path[:-1]])
        rounded = value.astype(DTYPES[files.dtypes[stored[path]]]).astype(model.dtype)
        _parameter(model, path).set_value(rounded)
    detach(model)


def _merged(kernel: jax.Array, linear: Linear) -> jax.Array:
    """f32[L, in, out]."""
    with jax.default_matmul_precision("highest"):
        product = jnp.matmul(linear.lora_a[...], linear.lora_b[...])
    return kernel.astype(jnp.float32) + linear.lora_scale * product


def _parameter(model: QwenVL, path: tuple) -> nnx.Param:
    return functools.reduce(lambda node, key: node[key] if isinstance(key, int) else getattr(node, key), path, model)
