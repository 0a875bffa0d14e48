"""Model configurations: an HF `config.json` read into frozen dataclasses, every published spelling accepted.

The only job of this file is to turn the dictionary of a checkpoint folder into numbers the modules use, and to
refuse what the modules would compute wrongly. Two generations of spellings are in circulation (the files the
checkpoints were released with and the ones `transformers` 5 writes); both are read, none is guessed: a missing
`rope_theta` is an error, because library defaults differ from the released models by a factor of ten.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mllm4d_jax.encode.processor_config import FAMILIES, TOKEN_IDS

DTYPES = ("float32", "bfloat16", "float16")
_CONTEXT = "original_max_position_embeddings"


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

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> ModelConfig:
        """Reads `folder/config.json`.

        Raises:
          ModelConfigError: the file is absent, not JSON, or describes something this port does not run.
        """
        path = pathlib.Path(folder) / "config.json"
        if not path.is_file():
            raise ModelConfigError(f"{path} does not exist: point the model path at a folder in Hugging Face format")
        try:
            raw = json.loads(path.read_text())
        except json.JSONDecodeError as e:
            raise ModelConfigError(f"{path} is not valid JSON: {e}") from e
        return cls.from_dict(raw, where=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Builds a configuration from the parsed content of a `config.json`.

        Raises:
          ModelConfigError: unknown `model_type`, missing key, or an option that is not supported.
        """
        top, model_type = _Reader(raw, where), raw.get("model_type")
        if model_type not in FAMILIES:
            raise top.error(f"model_type {model_type!r} is not supported (known: {', '.join(FAMILIES)})")
        vision_raw = raw.get("vision_config")
        if not isinstance(vision_raw, Mapping):
            raise top.error("'vision_config' is missing")
        # Qwen2.5-VL was released flat; transformers 5 nests the text keys on re-saving.
        text_raw = raw.get("text_config", raw if model_type == "qwen2_5_vl" else None)
        if not isinstance(text_raw, Mapping):
            raise top.error("'text_config' is missing")
        reader = _Reader(text_raw, f"{where}: text_config" if "text_config" in raw else where)
        text = _read_text(reader, model_type)
        vision = _read_vision(_Reader(vision_raw, f"{where}: vision_config"), model_type)
        if vision.out_hidden_size != text.hidden_size:
            raise top.error(
                f"vision out_hidden_size {vision.out_hidden_size} differs from text hidden_size {text.hidden_size}"
            )
        tied = raw.get("tie_word_embeddings")
        if model_type == "qwen2_5_vl" and not tied and text_raw.get("tie_word_embeddings"):
            tied = True  # older nested files say so only there; in the other families that key means nothing
        return cls(
            model_type=model_type,
            text=text,
            vision=vision,
            **{name: top.int(name) for name in TOKEN_IDS},
            tied=None if tied is None else bool(tied),
            dtype=_read_dtype(top, reader),
            source=json.dumps(raw),
        )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads keys of one dictionary with errors that name the place."""

    raw: Mapping[str, Any]
    where: str

    def error(self, text: str) -> ModelConfigError:
        return ModelConfigError(f"{self.where}: {text}")

    def get(self, *names: str, default: Any = None) -> Any:
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        if default is None:
            raise self.error(f"key {' / '.join(map(repr, names))} is missing")
        return default

    def int(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"key {names[0]!r} must be an integer, got {value!r}")
        return value

    def require(self, name: str, allowed: tuple, default: Any) -> Any:
        value = self.raw.get(name, default)
        if value not in allowed:
            raise self.error(f"{name} = {value!r} is not supported (supported: {list(allowed)})")
        return value


def _read_dtype(*readers: _Reader) -> str | None:
    """Return the dtype that the first of the dictionaries names, by either spelling; "auto" names none."""
    for r in readers:
        for key in ("dtype", "torch_dtype"):
            value = r.raw.get(key)
            if value in (None, "auto"):
                continue
            name = str(value).removeprefix("torch.")
            if name not in DTYPES:
                raise r.error(f"{key} = {value!r} is not supported (supported: {', '.join(DTYPES)}, auto)")
            return name
    return None


def _read_rope(r: _Reader, head_dim: int, interleaved: bool) -> RopeConfig:
    # Where a file says something twice, transformers takes rope_scaling, and what is inside before what is beside it.
    scaling = r.raw.get("rope_scaling") or r.raw.get("rope_parameters") or {}
    theta = scaling.get("rope_theta") or r.raw.get("rope_theta")
    if theta is None:
        raise r.error(
            "rope_theta is absent (neither 'rope_theta' nor 'rope_parameters.rope_theta'); add the value "
            "the model was trained with: released Qwen3-VL uses 5000000, Qwen2.5-VL 1000000"
        )
    if scaling.get("partial_rotary_factor", r.raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise r.error("a partial_rotary_factor other than 1 is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    sections = scaling.get("mrope_section")
    if sections is None:
        raise r.error("mrope_section is missing from rope_scaling / rope_parameters")
    sections = tuple(int(s) for s in sections)
    if len(sections) != 3 or sum(sections) != head_dim // 2:
        raise r.error(f"mrope_section {list(sections)} must be 3 numbers summing to head_dim/2 = {head_dim // 2}")
    if bool(scaling.get("mrope_interleaved", interleaved)) != interleaved:
        raise r.error(f"mrope_interleaved = {not interleaved} is not supported for this family")
    if kind not in ("default", "mrope", "yarn"):
        raise r.error(f"rope_type {kind!r} is not supported (supported: default, mrope, yarn)")
    yarn = _read_yarn(r, scaling) if kind == "yarn" else None
    return RopeConfig(theta=float(theta), sections=sections, interleaved=interleaved, yarn=yarn)


def _read_yarn(r: _Reader, scaling: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    known = ("factor", _CONTEXT, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    found = {k: float(scaling[k]) for k in known if scaling.get(k) is not None}
    if "factor" not in found:
        raise r.error("rope_type 'yarn' needs the key 'factor'")
    # A text key of that name wins over the one among the rope parameters, as in transformers.
    found[_CONTEXT] = float(r.int(_CONTEXT, default=int(found.get(_CONTEXT) or r.int("max_position_embeddings"))))
    return tuple(sorted(found.items()))


def _read_moe(r: _Reader, num_layers: int) -> MoEConfig:
    mlp_only = set(r.raw.get("mlp_only_layers") or ())
    step = r.int("decoder_sparse_step", default=1)
    if step < 1:
        raise r.error(f"decoder_sparse_step must be at least 1, got {step}")
    return MoEConfig(
        num_experts=r.int("num_experts", "num_local_experts"),
        top_k=r.int("num_experts_per_tok"),
        intermediate_size=r.int("moe_intermediate_size"),
        sparse_layers=tuple(i not in mlp_only and (i + 1) % step == 0 for i in range(num_layers)),
    )


def _read_text(r: _Reader, model_type: str) -> TextConfig:
    r.require("hidden_act", ("silu",), "silu")
    hidden, heads = r.int("hidden_size"), r.int("num_attention_heads")
    qwen3 = FAMILIES[model_type] == "qwen3_vl"
    if r.raw.get("use_sliding_window"):
        raise r.error("use_sliding_window = true is not supported")
    head_dim = r.int("head_dim", default=hidden // heads)
    if not qwen3 and head_dim * heads != hidden:
        raise r.error(f"{heads} heads of {head_dim} do not make up hidden_size {hidden} in this family")
    num_layers = r.int("num_hidden_layers")
    kv_heads = r.int("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise r.error(f"{heads} heads are not a multiple of {kv_heads} key/value heads")
    attention_bias = bool(r.raw.get("attention_bias", False))
    return TextConfig(
        vocab_size=r.int("vocab_size"),
        hidden_size=hidden,
        intermediate_size=r.int("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(r.get("rms_norm_eps")),
        rope=_read_rope(r, head_dim, interleaved=qwen3),
        qk_norm=qwen3,
        qkv_bias=attention_bias if qwen3 else True,
        o_bias=attention_bias if qwen3 else False,
        moe=_read_moe(r, num_layers) if model_type == "qwen3_vl_moe" else None,
    )


def _read_vision(r: _Reader, model_type: str) -> VisionConfig:
    qwen3 = FAMILIES[model_type] == "qwen3_vl"
    activation = "gelu_pytorch_tanh" if qwen3 else "silu"
    r.require("hidden_act", (activation,), activation)
    common = dict(
        depth=r.int("depth"),
        hidden_size=r.int("hidden_size"),
        intermediate_size=r.int("intermediate_size"),
        num_heads=r.int("num_heads"),
        out_hidden_size=r.int("out_hidden_size"),
        in_channels=r.int("in_channels", "in_chans", default=3),
        patch_size=r.int("patch_size", default=16 if qwen3 else 14),
        temporal_patch_size=r.int("temporal_patch_size", default=2),
        merge_size=r.int("spatial_merge_size", default=2),
    )
    if common["hidden_size"] % (4 * common["num_heads"]):
        raise r.error(f"the head width {common['hidden_size']}/{common['num_heads']} must be a multiple of 4")
    rope = r.raw.get("rope_scaling") or r.raw.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or r.raw.get("rope_theta") or 10000.0
    if theta != 10000.0:
        raise r.error(f"a vision rope_theta of {theta} is not supported (every release uses 10000)")
    if not qwen3:
        full, window = tuple(r.get("fullatt_block_indexes")), r.int("window_size")
        if window < common["merge_size"] * common["patch_size"]:
            merged = f"({common['merge_size']} x {common['patch_size']} pixels)"
            raise r.error(f"window_size {window} is smaller than one merged token {merged}")
        return VisionConfig(
            **common, window=window, full_blocks=full, tokens_per_second=float(r.get("tokens_per_second"))
        )
    positions = r.int("num_position_embeddings")
    side = round(positions**0.5)
    if side * side != positions:
        raise r.error(f"num_position_embeddings {positions} is not a square")
    deepstack = tuple(r.get("deepstack_visual_indexes"))
    if any(not 0 <= i < common["depth"] for i in deepstack) or len(set(deepstack)) != len(deepstack):
        raise r.error(f"deepstack_visual_indexes {list(deepstack)} must be distinct block indices")
    return VisionConfig(**common, position_side=side, deepstack=deepstack)
