"""Tiny random models far from the committed fixtures: other sizes, ids, spellings, layouts, grids.

Each variant is built and recorded with transformers, then stored a second time the way checkpoints were released. The
names say what is unusual; everything else is drawn from the defaults below.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tools.reference.cases import ASK, END, TURN, Pixels, Text

IDS = MappingProxyType(
    {"image_token_id": 103, "video_token_id": 104, "vision_start_token_id": 101, "vision_end_token_id": 102}
)
TEXT = MappingProxyType(
    dict(
        vocab_size=112,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        bos_token_id=106,
        eos_token_id=105,
    )
)
VISION = MappingProxyType(dict(depth=3, hidden_size=24, intermediate_size=36, num_heads=2, patch_size=4))
MIXED = (
    (
        ASK,
        Pixels("video", 2, 3, 2, 0.7),
        Text("and"),
        Pixels("image", 1, 2, 5),
        Pixels("image", 1, 1, 1),
        Text("then"),
        Pixels("video", 3, 1, 4, 1.3),
        TURN,
        END,
    ),
    (Pixels("image", 1, 4, 1), Pixels("video", 1, 2, 3, 0.35), TURN, END),
    (Text("a b c"), END),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model and how its second copy is stored.

    Attributes:
      model_type: as in config.json.
      text, vision, top: configuration keys that differ from the defaults.
      rope: rope_parameters that differ from the defaults.
      rows: the recorded batch.
      right: record it padded on the right too.
      grads: record gradients.
      dtype: of the stored tensors.
      shard: max_shard_size of `save_pretrained`.
      theta_inside: the released copy has rope_theta inside rope_scaling.
      experts: layout of the released copy's expert tensors, "in_out" (as published) or "out_in" (transformers 5).
      store_head: the released copy of a tied model has lm_head.weight as well.
      tie_in: where the released copy says whether it is tied: "top", "text" or "nowhere".
      nested: the released copy keeps text_config (Qwen2.5-VL).
    """

    model_type: str
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vision: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    top: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: tuple = MIXED
    right: bool = False
    grads: bool = True
    dtype: str = "float32"
    shard: str = "1GB"
    theta_inside: bool = False
    experts: str = "in_out"
    store_head: bool = False
    tie_in: str = "top"
    nested: bool = False

    def config(self) -> dict[str, Any]:
        """The keyword arguments of the transformers configuration."""
        qwen3 = self.model_type != "qwen2_5_vl"
        text = {**TEXT, **({"head_dim": 16} if qwen3 else {}), **self.text}
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2] if qwen3 else [2, 1, 1]}
        if qwen3:
            rope["mrope_interleaved"] = True
            vision = {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]}
        else:
            vision = {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        if self.model_type == "qwen3_vl_moe":
            moe = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
            text = {**moe, "tie_word_embeddings": False, **text}
        vision = {**VISION, **vision, "out_hidden_size": text["hidden_size"], **self.vision}
        text["rope_parameters"] = {**rope, **self.rope}
        return {"text_config": text, "vision_config": vision, "tie_word_embeddings": False, **IDS, **self.top}

    def released(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of the released copy, from the one transformers 5 wrote."""
        raw = copy.deepcopy(dict(raw))
        text, vision = raw["text_config"], raw["vision_config"]
        scaling = text.pop("rope_parameters")
        if not self.theta_inside:
            text["rope_theta"] = scaling.pop("rope_theta")
        if self.model_type == "qwen2_5_vl" and scaling["rope_type"] == "default":
            scaling["type"] = scaling.pop("rope_type").replace("default", "mrope")
        text["rope_scaling"] = scaling
        if "num_local_experts" in text:
            text["num_experts"] = text.pop("num_local_experts")
        vision["model_type"] = self.model_type
        del vision["rope_parameters"]
        raw["torch_dtype"] = raw.pop("dtype")
        tied = raw.pop("tie_word_embeddings")
        text.pop("tie_word_embeddings", None)
        if self.tie_in != "nowhere":
            (raw if self.tie_in == "top" else text)["tie_word_embeddings"] = tied
        if self.model_type == "qwen2_5_vl":
            vision["in_chans"] = vision.pop("in_channels")
            if not self.nested:
                raw |= {k: v for k, v in raw.pop("text_config").items() if k != "model_type"}
        return raw


def _scaled(rows: tuple, factor: int) -> tuple:
    """The rows with grids `factor` times as wide."""

    def scale(segment):
        return dataclasses.replace(segment, w=segment.w * factor) if isinstance(segment, Pixels) else segment

    return tuple(tuple(map(scale, row)) for row in rows)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
Q3, MOE, Q25 = "qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"
VARIANTS = MappingProxyType(
    {
        "q3-wide-heads-kv1-odd-ids": Variant(
            Q3,
            text=dict(hidden_size=40, num_attention_heads=6, num_key_value_heads=1, rms_norm_eps=1e-5, vocab_size=211),
            vision=dict(patch_size=2, num_position_embeddings=16, deepstack_visual_indexes=[1]),
            top=dict(image_token_id=3, video_token_id=207, vision_start_token_id=200, vision_end_token_id=17),
            rope=dict(rope_theta=1e4, mrope_section=[2, 3, 3]),
            right=True,
        ),
        "q3-mha-bias-tied-head-stored-bf16": Variant(
            Q3,
            text=dict(num_key_value_heads=4, attention_bias=True),
            vision=dict(patch_size=6, deepstack_visual_indexes=[0, 1, 2], num_heads=6),
            top=dict(tie_word_embeddings=True),
            rope=dict(rope_theta=5e5, mrope_section=[6, 1, 1]),
            dtype="bfloat16",
            theta_inside=True,
            store_head=True,
        ),
        "q3-deepstack-out-of-order-merge4-tie-in-text": Variant(
            Q3,
            text=dict(num_hidden_layers=3),
            vision=dict(depth=4, deepstack_visual_indexes=[3, 0, 2], spatial_merge_size=4, num_position_embeddings=49),
            top=dict(tie_word_embeddings=True),
            tie_in="text",
        ),
        "q3-yarn-sharded-more-taps-than-layers": Variant(
            Q3,
            text=dict(num_hidden_layers=1),
            vision=dict(deepstack_visual_indexes=[0, 1, 2], temporal_patch_size=3, in_channels=1),
            rope=YARN,
            shard="20KB",
            tie_in="nowhere",
            right=True,
        ),
        "q3-no-taps-merge1-depth1": Variant(
            Q3,
            text=dict(num_hidden_layers=4, head_dim=8),
            vision=dict(depth=1, deepstack_visual_indexes=[], spatial_merge_size=1, temporal_patch_size=1, num_heads=1),
            top=dict(tie_word_embeddings=True),
            rope=dict(mrope_section=[0, 2, 2], rope_theta=100.0),
            tie_in="nowhere",
        ),
        "moe-sparse-step2-mlp-only-top1": Variant(
            MOE,
            text=dict(
                num_hidden_layers=6,
                mlp_only_layers=[3],
                decoder_sparse_step=2,
                num_experts_per_tok=1,
                num_key_value_heads=1,
                rms_norm_eps=1e-5,
            ),
            vision=dict(deepstack_visual_indexes=[1]),
            right=True,
        ),
        "moe-2I=H-v5-layout-tied": Variant(
            MOE,
            text=dict(moe_intermediate_size=16),
            top=dict(tie_word_embeddings=True),
            experts="out_in",
        ),
        "moe-2I=H-yarn-sharded": Variant(
            MOE, text=dict(moe_intermediate_size=16), rope=YARN | {"attention_factor": 1.2}, shard="20KB", grads=False
        ),
        "moe-I=H-all-experts-bias-mlp-first": Variant(
            MOE,
            text=dict(
                hidden_size=24,
                moe_intermediate_size=24,
                num_experts=3,
                num_experts_per_tok=3,
                attention_bias=True,
                mlp_only_layers=[0],
                num_hidden_layers=3,
            ),
            vision=dict(deepstack_visual_indexes=[2, 1], patch_size=2),
            rope=dict(mrope_section=[2, 5, 1]),
        ),
        "moe-I=H-v5-layout-tied-head-stored": Variant(
            MOE,
            text=dict(hidden_size=24, moe_intermediate_size=24),
            top=dict(tie_word_embeddings=True),
            experts="out_in",
            store_head=True,
        ),
        "q25-windows-cut-nested": Variant(
            Q25,
            vision=dict(tokens_per_second=4, depth=4, fullatt_block_indexes=[1, 3]),
            nested=True,
            right=True,
        ),
        "q25-all-full-mha-tie-in-text": Variant(
            Q25,
            text=dict(num_key_value_heads=4, rms_norm_eps=1e-3),
            vision=dict(fullatt_block_indexes=[0, 1, 2], patch_size=6, window_size=36, tokens_per_second=3),
            top=dict(tie_word_embeddings=True),
            rope=dict(mrope_section=[1, 2, 1], rope_theta=1e4),
            tie_in="text",
            nested=True,
        ),
        "q25-no-full-window1-yarn-sharded": Variant(
            Q25,
            text=dict(num_key_value_heads=1, hidden_size=48, rms_norm_eps=1e-5),
            vision=dict(fullatt_block_indexes=[], window_size=8, patch_size=2, spatial_merge_size=4, num_heads=3),
            rope=YARN | dict(mrope_section=[3, 1, 2]),
            shard="20KB",
            theta_inside=True,
        ),
        "q25-window-beyond-grid-tied-bf16": Variant(
            Q25,
            vision=dict(window_size=400, temporal_patch_size=1, tokens_per_second=25),
            top=dict(tie_word_embeddings=True, image_token_id=5, video_token_id=6),
            rows=_scaled(MIXED, 2),
            dtype="bfloat16",
            tie_in="nowhere",
        ),
        "q25-tied-head-stored-flat": Variant(
            Q25, vision=dict(num_heads=6, window_size=24), top=dict(tie_word_embeddings=True), store_head=True
        ),
    }
)
