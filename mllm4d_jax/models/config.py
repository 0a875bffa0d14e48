"""Model configurations: an HF `config.json` read into frozen dataclasses, every published spelling accepted.

The only job of this file is to turn the dictionary of a checkpoint folder into numbers the modules use, and to
refuse what the modules would compute wrongly or could not hold. Two generations of spellings are in circulation (the
files the checkpoints were released with and the ones `transformers` 5 writes); both are read, none is guessed: a
missing `rope_theta` is an error, because library defaults differ from the released models by a factor of ten. Only what
a version of `transformers` leaves out of its files has a default, see `_LEFT_OUT`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mllm4d_jax.encode.processor_config import FAMILIES, SIZE_LIMITS, TOKEN_IDS
from mllm4d_jax.files.json_object import JsonObject, read_object, whole
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import place

DTYPES = ("float32", "bfloat16", "float16")
_CONTEXT = "original_max_position_embeddings"
# The largest size that is believed: several times that of any published model, so that a slip of the file is refused
# before anything is counted or laid out for it.
_LAYERS, _WIDTH, _HEADS, _HEAD_DIM, _EXPERTS = 1000, 1 << 20, 1024, 1024, 4096
_VOCABULARY, _POSITIONS, _PIXELS = 1 << 22, 1 << 30, 1 << 16
# transformers up to 4.49 writes of a vision_config only what differs from the class, and every version since agrees on
# these values of it. `tokens_per_second` is not among them: no released model has the one of the class.
_LEFT_OUT: Mapping[str, Any] = MappingProxyType(
    dict(
        depth=32,
        hidden_size=3584,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
    )
)


class ModelConfigError(ValueError):
    """A model configuration that this port cannot run exactly. The message names the key and what to do."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the text decoder."""

    theta: float  # base of the inverse frequencies
    sections: tuple[int, int, int]  # frequencies taken from the (T, H, W) position rows; sums to `head_dim / 2`
    interleaved: bool  # True for Qwen3-VL (T,H,W,T,H,W,...), False for Qwen2.5-VL (contiguous runs)
    yarn: tuple[tuple[str, float], ...] | None = None  # the YaRN parameters, sorted (key, value)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Sparse feed-forward layers (Qwen3-VL-MoE)."""

    num_experts: int
    top_k: int
    intermediate_size: int
    sparse_layers: tuple[bool, ...]  # one flag a decoder layer


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Text decoder. Sizes as in the HF keys of the same meaning."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    qk_norm: bool  # Qwen3: RMSNorm of q and k per head
    qkv_bias: bool
    o_bias: bool
    moe: MoEConfig | None = None

    def sparse(self, layer: int) -> bool:
        return self.moe is not None and self.moe.sparse_layers[layer]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Vision tower. Sizes as in the HF keys of the same meaning."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    position_side: int = 0  # of the learned position table (0: none, Qwen2.5-VL)
    deepstack: tuple[int, ...] = ()  # indices of the blocks whose output is tapped (empty for Qwen2.5-VL)
    window: int = 0  # side of an attention window in pixels (0: none)
    full_blocks: tuple[int, ...] = ()  # attend within the frame where there are windows
    tokens_per_second: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole vision-language model.

    `tied` is True, False, or None when the file does not say; the checkpoint's own tensors then decide.
    """

    model_type: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tied: bool | None
    dtype: str | None  # of the weights; None: whatever they are stored in
    source: str  # the config.json content, kept verbatim for saving

    @property
    def family(self) -> str:
        """`qwen3_vl` (dense and MoE) or `qwen2_5_vl`: the prompt, position and vision rules."""
        return FAMILIES[self.model_type]

    @property
    def largest_head(self) -> int:
        """Head size of decoder or tower, whichever is larger."""
        return max(self.text.head_dim, self.vision.head_dim)

    @property
    def grouped_widths(self) -> tuple[int, ...]:
        """Widths between which the sparse layers' grouped products go; none of a dense model."""
        moe = self.text.moe
        return (self.text.hidden_size, moe.intermediate_size) if moe else ()

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> ModelConfig:
        """Reads `folder/config.json`.

        Raises:
          ModelConfigError: the file is absent, not JSON, or describes something this port does not run.
        """
        path = place(folder) / "config.json"
        raw = read_object(path, ModelConfigError)
        if raw is None:
            raise ModelConfigError(f"{path} does not exist: point the model path at a folder in Hugging Face format")
        return cls.from_dict(raw, where=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Builds a configuration from the parsed content of a `config.json`.

        Raises:
          ModelConfigError: unknown `model_type`, a missing key, a value of another type or out of all proportion, or an
            option that is not supported.
        """
        top, model_type = JsonObject(raw, where, ModelConfigError), raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise top.error(f"model_type {shown(model_type)} is not supported (known: {', '.join(FAMILIES)})")
        if raw.get("vision_config") is None:
            raise top.error("'vision_config' is missing")
        # Qwen2.5-VL was released flat; transformers 5 nests the text keys on re-saving.
        nested = raw.get("text_config") is not None
        if not nested and model_type != "qwen2_5_vl":
            raise top.error("'text_config' is missing")
        reader = top.object("text_config") if nested else top
        text = _read_text(reader, model_type)
        vision = _read_vision(top.object("vision_config"), model_type)
        if vision.out_hidden_size != text.hidden_size:
            raise top.error(
                f"vision out_hidden_size {vision.out_hidden_size} differs from text hidden_size {text.hidden_size}"
            )
        tied = None if raw.get("tie_word_embeddings") is None else top.flag("tie_word_embeddings")
        if model_type == "qwen2_5_vl" and not tied and reader.flag("tie_word_embeddings"):
            tied = True  # older nested files say so only there; in the other families that key means nothing
        return cls(
            model_type=model_type,
            text=text,
            vision=vision,
            **_read_ids(top, text.vocab_size),
            tied=tied,
            dtype=_read_dtype(top, reader),
            source=json.dumps(raw),
        )


def _read_ids(r: JsonObject, vocab_size: int) -> dict[str, int]:
    ids = {name: r.integer(name, high=vocab_size - 1) for name in TOKEN_IDS}
    if len(set(ids.values())) < len(ids):
        told = ", ".join(f"{name} {value}" for name, value in ids.items())
        raise r.error(f"the ids of markers and placeholders must differ, got {told}")
    return ids


def _read_dtype(*readers: JsonObject) -> str | None:
    """Return the dtype that the first of the dictionaries names, by either spelling; "auto" names none."""
    for r in readers:
        for key in ("dtype", "torch_dtype"):
            value = r.raw.get(key)
            if value in (None, "auto"):
                continue
            name = value.removeprefix("torch.") if isinstance(value, str) else None
            if name not in DTYPES:
                raise r.error(f"{key} = {shown(value)} is not supported (supported: {', '.join(DTYPES)}, auto)")
            return name
    return None


def _rope_keys(r: JsonObject) -> JsonObject:
    # Where a file says something twice, transformers takes rope_scaling.
    return r.object("rope_scaling") if r.raw.get("rope_scaling") else r.object("rope_parameters")


def _read_rope(r: JsonObject, head_dim: int, interleaved: bool) -> RopeConfig:
    scaling = _rope_keys(r)
    holder = scaling if scaling.raw.get("rope_theta") is not None else r  # what is inside goes before what is beside it
    if holder.raw.get("rope_theta") is None:
        raise r.error(
            "rope_theta is absent (neither 'rope_theta' nor 'rope_parameters.rope_theta'); add the value "
            "the model was trained with: released Qwen3-VL uses 5000000, Qwen2.5-VL 1000000"
        )
    theta = holder.number("rope_theta", low=2, high=1e15)
    partial = scaling if scaling.raw.get("partial_rotary_factor") is not None else r
    if partial.number("partial_rotary_factor", low=0, high=1, default=1.0) != 1.0:
        raise r.error("a partial_rotary_factor other than 1 is not supported")
    if scaling.raw.get("mrope_section") is None:
        raise r.error("mrope_section is missing from rope_scaling / rope_parameters")
    sections = scaling.list_of("mrope_section", whole(0, head_dim), f"integers from 0 to {head_dim}")
    if len(sections) != 3 or sum(sections) != head_dim // 2:
        told = shown(list(sections))
        raise r.error(f"mrope_section {told} must be 3 numbers summing to head_dim/2 = {head_dim // 2}")
    if scaling.flag("mrope_interleaved", interleaved) != interleaved:
        raise r.error(f"mrope_interleaved = {not interleaved} is not supported for this family")
    kind = scaling.choice("rope_type", "type", allowed=("default", "mrope", "yarn"), default="default")
    yarn = _read_yarn(r, scaling) if kind == "yarn" else None
    return RopeConfig(theta=theta, sections=sections, interleaved=interleaved, yarn=yarn)


def _read_yarn(r: JsonObject, scaling: JsonObject) -> tuple[tuple[str, float], ...]:
    if scaling.raw.get("factor") is None:
        raise r.error("rope_type 'yarn' needs the key 'factor'")
    # A text key of that name wins over the one among the rope parameters, as in transformers.
    holder = next((o for o in (r, scaling) if o.raw.get(_CONTEXT) is not None), None)
    length = (r, "max_position_embeddings") if holder is None else (holder, _CONTEXT)
    found = {
        "factor": scaling.number("factor", low=1, high=1e6),
        _CONTEXT: float(length[0].integer(length[1], low=1, high=_POSITIONS)),
    }
    for name, low in dict(beta_fast=0, beta_slow=0, attention_factor=1e-6, mscale=0, mscale_all_dim=0).items():
        if scaling.raw.get(name) is not None:
            found[name] = scaling.number(name, low=low, high=1e6)
    if scaling.raw.get("truncate") is not None:
        found["truncate"] = float(scaling.flag("truncate"))
    return tuple(sorted(found.items()))


def _read_moe(r: JsonObject, num_layers: int) -> MoEConfig:
    fits, what = whole(0, _LAYERS), f"integers from 0 to {_LAYERS}"
    mlp_only = set(r.list_of("mlp_only_layers", fits, what, default=()))
    step = r.integer("decoder_sparse_step", low=1, high=_LAYERS, default=1)
    experts = r.integer("num_experts", "num_local_experts", low=1, high=_EXPERTS)
    return MoEConfig(
        num_experts=experts,
        top_k=r.integer("num_experts_per_tok", low=1, high=experts),
        intermediate_size=r.integer("moe_intermediate_size", low=1, high=_WIDTH),
        sparse_layers=tuple(i not in mlp_only and (i + 1) % step == 0 for i in range(num_layers)),
    )


def _read_text(r: JsonObject, model_type: str) -> TextConfig:
    r.choice("hidden_act", allowed=("silu",), default="silu")
    hidden = r.integer("hidden_size", low=1, high=_WIDTH)
    heads = r.integer("num_attention_heads", low=1, high=_HEADS)
    qwen3 = FAMILIES[model_type] == "qwen3_vl"
    if r.flag("use_sliding_window"):
        raise r.error("use_sliding_window = true is not supported")
    head_dim = r.integer("head_dim", low=2, high=_HEAD_DIM, default=hidden // heads)
    if not 2 <= head_dim <= _HEAD_DIM or head_dim % 2:
        raise r.error(f"head_dim {head_dim} (hidden_size / num_attention_heads where it is absent) must be even")
    if not qwen3 and head_dim * heads != hidden:
        raise r.error(f"{heads} heads of {head_dim} do not make up hidden_size {hidden} in this family")
    num_layers = r.integer("num_hidden_layers", low=1, high=_LAYERS)
    kv_heads = r.integer("num_key_value_heads", low=1, high=_HEADS, default=heads)
    if heads % kv_heads:
        raise r.error(f"{heads} heads are not a multiple of {kv_heads} key/value heads")
    attention_bias = r.flag("attention_bias")
    return TextConfig(
        vocab_size=r.integer("vocab_size", low=1, high=_VOCABULARY),
        hidden_size=hidden,
        intermediate_size=r.integer("intermediate_size", low=1, high=_WIDTH),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=r.number("rms_norm_eps", low=1e-30, high=1),
        rope=_read_rope(r, head_dim, interleaved=qwen3),
        qk_norm=qwen3,
        qkv_bias=attention_bias if qwen3 else True,
        o_bias=attention_bias if qwen3 else False,
        moe=_read_moe(r, num_layers) if model_type == "qwen3_vl_moe" else None,
    )


def _read_vision(r: JsonObject, model_type: str) -> VisionConfig:
    qwen3 = FAMILIES[model_type] == "qwen3_vl"
    left_out = {} if qwen3 else _LEFT_OUT
    activation = "gelu_pytorch_tanh" if qwen3 else "silu"
    r.choice("hidden_act", allowed=(activation,), default=activation)

    def size(name: str, high: int, *others: str, default: int | None = None) -> int:
        return r.integer(name, *others, low=1, high=high, default=left_out.get(name, default))

    common = dict(
        depth=size("depth", _LAYERS),
        hidden_size=size("hidden_size", _WIDTH),
        intermediate_size=size("intermediate_size", _WIDTH),
        num_heads=size("num_heads", _HEADS),
        out_hidden_size=size("out_hidden_size", _WIDTH),
        in_channels=size("in_channels", 16, "in_chans", default=3),
        patch_size=size("patch_size", SIZE_LIMITS["patch_size"], default=16 if qwen3 else 14),
        temporal_patch_size=size("temporal_patch_size", SIZE_LIMITS["temporal_patch_size"], default=2),
        merge_size=size("spatial_merge_size", SIZE_LIMITS["merge_size"], default=2),
    )
    if common["hidden_size"] % (4 * common["num_heads"]):
        raise r.error(f"the head width {common['hidden_size']}/{common['num_heads']} must be a multiple of 4")
    rope = _rope_keys(r)
    holder = rope if rope.raw.get("rope_theta") is not None else r
    theta = holder.number("rope_theta", low=0, default=10000.0)
    if theta != 10000.0:
        raise r.error(f"a vision rope_theta of {theta} is not supported (every release uses 10000)")
    if not qwen3:
        return _with_windows(r, common)
    positions = r.integer("num_position_embeddings", low=1, high=_POSITIONS)
    side = math.isqrt(positions)
    if side * side != positions:
        raise r.error(f"num_position_embeddings {positions} is not a square")
    last = common["depth"] - 1
    deepstack = r.list_of("deepstack_visual_indexes", whole(0, last), f"distinct block indices from 0 to {last}")
    if len(set(deepstack)) != len(deepstack):
        raise r.error(f"deepstack_visual_indexes {shown(list(deepstack))} must be distinct block indices")
    return VisionConfig(**common, position_side=side, deepstack=deepstack)


def _with_windows(r: JsonObject, common: Mapping[str, int]) -> VisionConfig:
    """Qwen2.5-VL: attention within windows in all blocks but some."""
    fits, what = whole(0, _LAYERS), f"integers from 0 to {_LAYERS}"  # indices past the last block mean nothing
    full = r.list_of("fullatt_block_indexes", fits, what, default=_LEFT_OUT["fullatt_block_indexes"])
    window = r.integer("window_size", low=1, high=_PIXELS, default=_LEFT_OUT["window_size"])
    if window < common["merge_size"] * common["patch_size"]:
        merged = f"({common['merge_size']} x {common['patch_size']} pixels)"
        raise r.error(f"window_size {window} is smaller than one merged token {merged}")
    rate = r.number("tokens_per_second", low=1e-3, high=1e3)
    return VisionConfig(**common, window=window, full_blocks=full, tokens_per_second=rate)
