"""Qwen3-VL, Qwen3-VL-MoE and Qwen2.5-VL as one module: vision tower, decoder, head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.models.attention import choose_backend
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.text import Decoder, DecoderOutput, KVCache
from mllm4d_jax.models.vision import VisionFeatures, VisionTower
from mllm4d_jax.processing.batch import ModelInputs
from mllm4d_jax.processing.grids import VisionGeometry, VisionInputs


def vision_geometry(config: ModelConfig) -> VisionGeometry:
    """The numbers the host needs to make the vision tower's index arrays."""
    v = config.vision
    return VisionGeometry(
        merge_size=v.merge_size,
        position_side=v.position_side,
        window=v.window // v.merge_size // v.patch_size,
    )


class QwenVL(nnx.Module):
    """A video language model.

    Construct through `models.hf.load_model`, or under `nnx.eval_shape` for shapes only.

    Args:
      config: from the checkpoint's config.json.
      dtype: parameter and activation dtype.
      attention: "auto" or a backend name, see `models.attention.resolve_backend`.
      remat: rematerialisation of both stacks, "none" or "full".
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
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.backend = choose_backend(attention, dtype, mesh)
        self.remat = remat
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.text = Decoder(config.text, dtype=dtype, rngs=rngs)
        shape = (config.text.hidden_size, config.text.vocab_size)
        head = None if config.tied else Linear(*shape, axes=("embed", "vocab"), bias=False, dtype=dtype, rngs=rngs)
        self.lm_head = head

    def encode_vision(self, vision: VisionInputs) -> VisionFeatures:
        """Runs the vision tower once for all frames of a batch."""
        return self.vision(vision, self.backend, remat=self.remat)

    def embed(self, tokens: jax.Array, vision_index: jax.Array, features: VisionFeatures | None):
        """Token embeddings with visual rows in place.

        Args:
          tokens: i32[B, S]; vision_index: i32[B, S], -1 for text.

        Returns:
          (x [B, S, H], deepstack [K, B, S, H] or None): DeepStack features are scattered once, zero at text tokens.
        """
        x = self.text.embed[...][tokens]
        if features is None:
            return x, None
        visual = (vision_index >= 0)[..., None]
        rows = jnp.maximum(vision_index, 0)
        x = jnp.where(visual, features.merged[rows].astype(x.dtype), x)
        deepstack = jnp.where(visual, features.deepstack[:, rows].astype(x.dtype), 0)
        return x, deepstack

    def forward(
        self,
        inputs: ModelInputs,
        *,
        features: VisionFeatures | None = None,
        cache: KVCache | None = None,
        collect: bool = False,
    ) -> DecoderOutput:
        """Full pass (training, or prefill when a cache is given).

        Args:
          inputs: see `ModelInputs`.
          features: precomputed vision features; None encodes `inputs.vision` here.
          cache: an empty cache of at least S slots to fill.
        """
        if features is None and inputs.vision is not None:
            features = self.encode_vision(inputs.vision)
        x, deepstack = self.embed(inputs.tokens, inputs.vision_index, features)
        out = self.text(
            x,
            inputs.positions,
            inputs.segment_ids,
            backend=self.backend,
            layout=inputs.layout,
            deepstack=deepstack,
            cache=cache,
            remat=self.remat,
            collect=collect,
        )
        if collect:
            out.collected["inputs_embeds"] = x
        return out

    def __call__(self, inputs: ModelInputs, features: VisionFeatures | None = None) -> jax.Array:
        """Hidden states after the final norm: [B, S, H]."""
        return self.forward(inputs, features=features).hidden

    def decode(self, tokens: jax.Array, positions: jax.Array, cache: KVCache, slot) -> DecoderOutput:
        """One step on a filled cache.

        Args:
          tokens: i32[B, S] new tokens (S is usually 1), written to slots `slot .. slot+S-1` of every row.
          positions: i32[3, B, S].
          slot: first cache slot to write, i32[].
        """
        x = self.text.embed[...][tokens]
        live = jnp.ones(tokens.shape, jnp.int32)
        return self.text(x, positions, live, backend=self.backend, cache=cache, slot=slot, prefill=False)

    def head_kernel(self) -> jax.Array:
        """The output projection [H, V]; the transposed embedding when tied."""
        return self.text.embed[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., H] -> f32[..., V]; call it on the positions that are needed, not on whole sequences."""
        if self.lm_head is not None:
            return self.lm_head(hidden).astype(jnp.float32)
        return (hidden @ self.head_kernel().astype(hidden.dtype)).astype(jnp.float32)
