"""Qwen3-VL, Qwen3-VL-MoE and Qwen2.5-VL as one module: vision tower, decoder, head."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.grids import VisionGeometry, VisionInputs
from mllm4d_jax.encode.positions import mrope_positions
from mllm4d_jax.models.attention import choose_backend
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.text import Decoder, DecoderOutput
from mllm4d_jax.models.vision import VisionFeatures, VisionTower
from mllm4d_jax.parallel.rules import BATCH_AXES, RULES, batch_shards, constrain, constrain_rows, partition_spec
from mllm4d_jax.rows.batch import ModelInputs


def vision_geometry(config: ModelConfig) -> VisionGeometry:
    """The numbers the host needs to make the vision tower's index arrays."""
    v = config.vision
    window = v.window // v.merge_size // v.patch_size
    return VisionGeometry(merge_size=v.merge_size, position_side=v.position_side, window=window)


def text_positions(
    config: ModelConfig, tokens: np.ndarray, grids: Sequence[Grid], seconds: Sequence[float] = (), rule: str = "release"
) -> tuple[np.ndarray, int]:
    """M-RoPE positions i32[3, S] of a sequence for this model, and the delta of what follows: see `mrope_positions`."""
    return mrope_positions(
        tokens,
        grids,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=config.vision.merge_size,
        family=config.family,
        second_per_grid=seconds,
        tokens_per_second=config.vision.tokens_per_second,
        rule=rule,
    )


class QwenVL(nnx.Module):
    """A video language model.

    Construct through `models.hf.load_model`, or under `nnx.eval_shape` for shapes only.

    Args:
      config: from the checkpoint's config.json.
      dtype: parameter and activation dtype.
      attention: "auto" or a backend name, see `models.attention.choose_backend`.
      remat: what the decoder keeps for the backward pass, see `models.layers.scan_layers`.
      vision_remat: the same for the vision tower; without effect unless the tower is trained, because nothing of a
        frozen tower is kept.
      mesh: the devices it will run on, whose platform decides "auto"; attention kernels are split over them. None for
        one device of this process.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype=jnp.bfloat16,
        attention: str = "auto",
        remat: str = "none",
        vision_remat: str = "full",
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.backend = choose_backend(attention, dtype, mesh, config.largest_head, config.grouped_widths)
        self.dtype, self.mesh = jnp.dtype(dtype), mesh
        self.remat, self.vision_remat = remat, vision_remat
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.text = Decoder(config.text, dtype=dtype, rngs=rngs)
        shape, kw = (config.text.hidden_size, config.text.vocab_size), dict(bias=False, dtype=dtype, rngs=rngs)
        self.lm_head = None if config.tied else Linear(*shape, axes=("embed", "vocab"), **kw)

    def encode_vision(self, vision: VisionInputs) -> VisionFeatures:
        """Runs the vision tower once for all frames of a batch."""
        return self.vision(vision, self.backend, remat=self.vision_remat)

    def embed(self, inputs: ModelInputs, features: VisionFeatures | None):
        """Token embeddings with visual rows in place.

        Returns:
          (x [B, S, H], deepstack [K, B, S, H] or None): DeepStack features are scattered once, zero at text tokens.
        """
        x = self._look_up(inputs.tokens)
        if features is None:
            return x, None
        visual = (inputs.vision_index >= 0)[..., None]
        index = jnp.maximum(inputs.vision_index, 0)
        if inputs.layout is None:
            merged, deepstack = features.merged[index], features.deepstack[:, index]
        else:
            # Each row takes from its own features, so that rows on other devices are not needed.
            rows, (count, width) = index.shape[0], features.merged.shape
            take = jax.vmap(lambda own, places: own[places])
            merged = constrain_rows(take(features.merged.reshape(rows, count // rows, width), index), self.mesh)
            taps = features.deepstack.reshape(len(features.deepstack), rows, count // rows, width)
            deepstack = constrain_rows(jax.vmap(take, (0, None))(taps, index), self.mesh, 1)
        return jnp.where(visual, merged.astype(x.dtype), x), jnp.where(visual, deepstack.astype(x.dtype), 0)

    def _look_up(self, tokens: jax.Array) -> jax.Array:
        """Rows of the embedding table, [B, S] -> [B, S, H].

        The table is split over its width by an axis that also splits the rows of the batch. Every device looks its
        columns up for the rows of the whole group, which are then exchanged: far less than the table itself, which is
        what XLA would gather.
        """
        table = self.text.embed[...]
        if self.mesh is None or tokens.shape[0] % batch_shards(self.mesh):
            return table[tokens]
        group = tuple(axis for axis in BATCH_AXES if axis != RULES["embed"])
        columns = partition_spec(("vocab", "embed"), table.shape, self.mesh)[1]
        x = table[constrain(tokens, self.mesh, group)]
        return constrain_rows(constrain(x, self.mesh, group, None, columns), self.mesh)

    def forward(
        self,
        inputs: ModelInputs,
        *,
        features: VisionFeatures | None = None,
        keep_cache: bool = False,
        collect: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> DecoderOutput:
        """Full pass: training, or prefill when keys and values are kept.

        Args:
          inputs: see `ModelInputs`.
          features: precomputed vision features; None encodes `inputs.vision` here.
          keep_cache, collect, dropout_key: see `Decoder`.
        """
        if features is None and inputs.vision is not None:
            features = self.encode_vision(inputs.vision)
        x, deepstack = self.embed(inputs, features)
        out = self.text(
            x,
            inputs.positions,
            inputs.segment_ids,
            backend=self.backend,
            layout=inputs.layout,
            deepstack=deepstack,
            keep_cache=keep_cache,
            remat=self.remat,
            collect=collect,
            dropout_key=dropout_key,
        )
        if collect:
            out.collected["inputs_embeds"] = x
        return out

    def __call__(
        self, inputs: ModelInputs, features: VisionFeatures | None = None, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states after the final norm: [B, S, H]."""
        return self.forward(inputs, features=features, dropout_key=dropout_key).hidden

    def head_kernel(self) -> jax.Array:
        """The output projection [H, V]; the transposed embedding when tied."""
        return self.text.embed[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., H] -> f32[..., V]; call it on the positions that are needed, not on whole sequences."""
        if self.lm_head is not None:
            return self.lm_head(hidden).astype(jnp.float32)
        return (hidden @ self.head_kernel().astype(hidden.dtype)).astype(jnp.float32)
