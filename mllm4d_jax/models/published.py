"""config.json content of the published models, for shape checks, ahead-of-time planning and random checkpoints.

Sources: the configuration files of the Hugging Face repositories as of the releases; the 235B vision block is inferred
(it must match the 30B/8B tower because its parameter count does).
"""

from __future__ import annotations

from typing import Any

from mllm4d_jax.models.config import ModelConfigError

# size: H, layers, heads, kv heads, intermediate, tied, ViT (depth, D, I, taps), MoE (experts, top-k, I) or None
_SMALL_VIT = (24, 1024, 4096, (5, 11, 17))
_LARGE_VIT = (27, 1152, 4304, (8, 16, 24))
_QWEN3 = {
    "2b": (2048, 28, 16, 8, 6144, True, _SMALL_VIT, None),
    "4b": (2560, 36, 32, 8, 9728, True, _SMALL_VIT, None),
    "8b": (4096, 36, 32, 8, 12288, False, _LARGE_VIT, None),
    "32b": (5120, 64, 64, 8, 25600, False, _LARGE_VIT, None),
    "30b_a3b": (2048, 48, 32, 4, 6144, False, _LARGE_VIT, (128, 8, 768)),
    "235b_a22b": (4096, 94, 64, 4, 12288, False, _LARGE_VIT, (128, 8, 1536)),
}
SIZES = (*_QWEN3, "qwen2_5_vl_7b")


def published_config(size: str) -> dict[str, Any]:
    """The config.json dictionary of a published model, in the spelling it was released with.

    Args:
      size: one of `SIZES`.

    Raises:
      ModelConfigError: unknown size.
    """
    if size == "qwen2_5_vl_7b":
        return _qwen2_5_vl_7b()
    if size not in _QWEN3:
        raise ModelConfigError(f"unknown published size {size!r} (known: {', '.join(SIZES)})")
    *_, tied, _, moe = _QWEN3[size]
    kind = "qwen3_vl_moe" if moe else "qwen3_vl"
    return dict(
        architectures=["Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"],
        image_token_id=151655,
        model_type=kind,
        text_config=_qwen3_text(size, f"{kind}_text"),
        tie_word_embeddings=tied,
        video_token_id=151656,
        vision_config=_qwen3_vision(size, kind),
        vision_end_token_id=151653,
        vision_start_token_id=151652,
    )


def _qwen3_text(size: str, model_type: str) -> dict[str, Any]:
    hidden, layers, heads, kv, inner, _, _, moe = _QWEN3[size]
    text = dict(
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=151643,
        dtype="bfloat16",
        eos_token_id=151645,
        head_dim=128,
        hidden_act="silu",
        hidden_size=hidden,
        initializer_range=0.02,
        intermediate_size=inner,
        max_position_embeddings=262144,
        model_type=model_type,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        num_key_value_heads=kv,
        rms_norm_eps=1e-6,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
        rope_theta=5000000,
        use_cache=True,
        vocab_size=151936,
    )
    if moe:
        experts, top_k, expert_inner = moe
        text |= dict(
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=expert_inner,
            norm_topk_prob=True,
            num_experts=experts,
            num_experts_per_tok=top_k,
            router_aux_loss_coef=0.001,
        )
    return text


def _qwen3_vision(size: str, model_type: str) -> dict[str, Any]:
    hidden, (depth, width, inner, taps) = _QWEN3[size][0], _QWEN3[size][6]
    return dict(
        deepstack_visual_indexes=list(taps),
        depth=depth,
        hidden_act="gelu_pytorch_tanh",
        hidden_size=width,
        in_channels=3,
        initializer_range=0.02,
        intermediate_size=inner,
        model_type=model_type,
        num_heads=16,
        num_position_embeddings=2304,
        out_hidden_size=hidden,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )


def _qwen2_5_vl_7b() -> dict[str, Any]:
    vision = dict(
        depth=32,
        hidden_act="silu",
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        in_chans=3,
        out_hidden_size=3584,
        patch_size=14,
        spatial_merge_size=2,
        spatial_patch_size=14,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=2,
        temporal_patch_size=2,
    )
    return dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151645,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        vision_token_id=151654,
        image_token_id=151655,
        video_token_id=151656,
        hidden_act="silu",
        hidden_size=3584,
        initializer_range=0.02,
        intermediate_size=18944,
        max_position_embeddings=128000,
        max_window_layers=28,
        model_type="qwen2_5_vl",
        num_attention_heads=28,
        num_hidden_layers=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        use_cache=True,
        use_sliding_window=False,
        vision_config=vision,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        vocab_size=152064,
    )
