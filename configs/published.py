"""The published models: where their weights are, and the content of their config.json.

For `model.published`, shape checks, ahead-of-time planning and random checkpoints. Source: the configuration files of
the Hugging Face repositories as of the releases. The vision tower of 235b_a22b is inferred: with that of 8b the
parameters add up to the count of the release.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from configs.schema import ConfigError, did_you_mean


class Tower(NamedTuple):
    """Dimensions of a Qwen3-VL vision tower; `taps` are the layers whose features enter the text model."""

    depth: int
    width: int
    inner: int
    taps: tuple[int, ...]


class Experts(NamedTuple):
    """Dimensions of a mixture of experts."""

    count: int
    top_k: int
    inner: int


class Size(NamedTuple):
    """Repository and dimensions of a published model; without a Qwen3-VL tower it is a Qwen2.5-VL."""

    repository: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    tower: Tower | None
    experts: Experts | None = None
    tied: bool = False


_SMALL, _LARGE = Tower(24, 1024, 4096, (5, 11, 17)), Tower(27, 1152, 4304, (8, 16, 24))
SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "2b": Size("Qwen/Qwen3-VL-2B-Instruct", 2048, 28, 16, 8, 6144, _SMALL, tied=True),
        "4b": Size("Qwen/Qwen3-VL-4B-Instruct", 2560, 36, 32, 8, 9728, _SMALL, tied=True),
        "8b": Size("Qwen/Qwen3-VL-8B-Instruct", 4096, 36, 32, 8, 12288, _LARGE),
        "32b": Size("Qwen/Qwen3-VL-32B-Instruct", 5120, 64, 64, 8, 25600, _LARGE),
        "30b_a3b": Size("Qwen/Qwen3-VL-30B-A3B-Instruct", 2048, 48, 32, 4, 6144, _LARGE, Experts(128, 8, 768)),
        "235b_a22b": Size("Qwen/Qwen3-VL-235B-A22B-Instruct", 4096, 94, 64, 4, 12288, _LARGE, Experts(128, 8, 1536)),
        "qwen2_5_vl_7b": Size("Qwen/Qwen2.5-VL-7B-Instruct", 3584, 28, 28, 4, 18944, None),
    }
)
_SPECIAL_IDS = MappingProxyType(
    dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
)
PAPER = "8b"  # what the paper trains


def published_config(name: str) -> dict[str, Any]:
    """Return the config.json dictionary of a published model, in the spelling it was released with.

    Args:
      name: one of `SIZES`.

    Raises:
      ConfigError: unknown name.
    """
    if name not in SIZES:
        raise ConfigError(f"unknown published size '{name}'{did_you_mean(name, SIZES)} (known: {', '.join(SIZES)})")
    return hugging_face_config(SIZES[name])


def hugging_face_config(size: Size) -> dict[str, Any]:
    """Return the config.json dictionary of a model of this size, in the spelling of the releases."""
    if size.tower is None:
        return _qwen2_5_vl(size)
    kind = "qwen3_vl_moe" if size.experts else "qwen3_vl"
    return _SPECIAL_IDS | dict(
        architectures=["Qwen3VLMoeForConditionalGeneration" if size.experts else "Qwen3VLForConditionalGeneration"],
        model_type=kind,
        text_config=_qwen3_text(size, f"{kind}_text"),
        tie_word_embeddings=size.tied,
        vision_config=_qwen3_vision(size.tower, size.hidden, kind),
    )


def _text(size: Size) -> dict[str, Any]:
    """Return the keys of the text model that both families have."""
    return dict(
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151645,
        hidden_act="silu",
        hidden_size=size.hidden,
        initializer_range=0.02,
        intermediate_size=size.inner,
        num_attention_heads=size.heads,
        num_hidden_layers=size.layers,
        num_key_value_heads=size.kv_heads,
        rms_norm_eps=1e-6,
        use_cache=True,
    )


def _qwen3_text(size: Size, model_type: str) -> dict[str, Any]:
    text = _text(size) | dict(
        attention_bias=False,
        dtype="bfloat16",
        head_dim=128,
        max_position_embeddings=262144,
        model_type=model_type,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
        rope_theta=5000000,
        vocab_size=151936,
    )
    if size.experts:
        text |= dict(
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=size.experts.inner,
            norm_topk_prob=True,
            num_experts=size.experts.count,
            num_experts_per_tok=size.experts.top_k,
            router_aux_loss_coef=0.001,
        )
    return text


def _qwen3_vision(tower: Tower, hidden: int, model_type: str) -> dict[str, Any]:
    return dict(
        deepstack_visual_indexes=list(tower.taps),
        depth=tower.depth,
        hidden_act="gelu_pytorch_tanh",
        hidden_size=tower.width,
        in_channels=3,
        initializer_range=0.02,
        intermediate_size=tower.inner,
        model_type=model_type,
        num_heads=16,
        num_position_embeddings=2304,
        out_hidden_size=hidden,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )


def _qwen2_5_vl(size: Size) -> dict[str, Any]:
    vision = dict(
        depth=32,
        hidden_act="silu",
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        in_chans=3,
        out_hidden_size=size.hidden,
        patch_size=14,
        spatial_merge_size=2,
        spatial_patch_size=14,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=2,
        temporal_patch_size=2,
    )
    special = dict(_SPECIAL_IDS, vision_token_id=151654)
    return (
        _text(size)
        | special
        | dict(
            architectures=["Qwen2_5_VLForConditionalGeneration"],
            max_position_embeddings=128000,
            max_window_layers=size.layers,
            model_type="qwen2_5_vl",
            rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
            rope_theta=1000000.0,
            sliding_window=32768,
            tie_word_embeddings=size.tied,
            torch_dtype="bfloat16",
            use_sliding_window=False,
            vision_config=vision,
            vocab_size=152064,
        )
    )
