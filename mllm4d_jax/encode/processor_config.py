"""The numbers of a model's processor, read from its Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from mllm4d_jax.encode.chat_template import ChatForm, chat_form
from mllm4d_jax.files.json_object import JsonObject, read_object, real
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import place
from mllm4d_jax.qa.errors import ProcessorError

FAMILIES = {"qwen3_vl": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl", "qwen2_5_vl": "qwen2_5_vl"}
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

# The largest sizes and areas that are believed, so that a slip of a file is refused before anything is laid out for it.
SIZE_LIMITS: Mapping[str, int] = MappingProxyType({"patch_size": 1024, "temporal_patch_size": 64, "merge_size": 16})
_LOWER_BOUND, _UPPER_BOUND = 1 << 28, 1 << 40  # largest areas: the lower bound enlarges frames, the upper one does not
_LARGEST_ID, _DEEPEST = (1 << 31) - 1, 1e6
# What the published checkpoints ship, for folders without preprocessor files: numbers, and areas of images and videos.
_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "qwen3_vl": {
        "patch_size": 16,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "image": (65536, 16777216),
        "video": (4096, 25165824),
    },
    "qwen2_5_vl": {
        "patch_size": 14,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
        "image": (3136, 12845056),
    },
}


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """Processor numbers of one checkpoint.

    Attributes:
      family: "qwen3_vl" (dense and MoE) or "qwen2_5_vl".
      patch_size, temporal_patch_size, merge_size: pixels per patch side, frames per patch, patches merged per side.
      image_mean, image_std: per RGB channel, of values in 0..1.
      image_min_pixels, image_max_pixels: areas.
      video_min_pixels, video_max_pixels: areas; over all frames for Qwen3-VL, per frame for Qwen2.5-VL.
      tokens_per_second: resolution of the T axis (Qwen2.5-VL), else 0.
      vocab_size: rows of the model's embeddings; None = not known.
      chat: form of the prompts; None = the family's published Instruct form.
    """

    family: str
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    image_min_pixels: int
    image_max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    tokens_per_second: float
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    vocab_size: int | None = None
    chat: ChatForm | None = None

    @property
    def factor(self) -> int:
        """Pixel side of one merged token; frame sides are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_folder(cls, path: str | Path, chat_template: str = "auto") -> Self:
        """Reads config.json and, where present, the preprocessor files and the chat template.

        Which file counts is as in transformers 5: settings nested in processor_config.json; where it has none, those of
        preprocessor_config.json for images, and for videos those of video_preprocessor_config.json or, without that
        one, of preprocessor_config.json too. One of them counts, whole; the others are not looked at. Token ids always
        come from config.json.

        Args:
          chat_template: form of the prompts, see `chat_template.chat_form`.

        Raises:
          ProcessorError: config.json missing or not of a supported family, a key missing, settings of images, videos
            and config.json that contradict each other, or a chat template of another form.
        """
        folder = place(path)
        config = read_object(folder / "config.json", ProcessorError)
        if config is None:
            raise ProcessorError(f"{folder}/config.json not found: give the folder of a Hugging Face checkpoint")
        both = read_object(folder / "processor_config.json", ProcessorError) or {}
        image, video = both.get("image_processor"), both.get("video_processor")
        if image is None:
            image = read_object(folder / "preprocessor_config.json", ProcessorError)
        for older in ("video_preprocessor_config.json", "preprocessor_config.json"):
            video = read_object(folder / older, ProcessorError) if video is None else video
        made = cls.of(config, folder, image, video)
        return dataclasses.replace(made, chat=chat_form(folder, made.family, chat_template))

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        where: str | Path,
        image: Mapping[str, Any] | None = None,
        video: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the processor of a config.json; what it leaves open is as released with the published checkpoints.

        Args:
          config: content of config.json.
          where: its folder, or the model's name, for messages.
          image, video: settings of the image and the video processor; None for none.

        Raises:
          ProcessorError: as `from_folder`.
        """
        folder, where = where, place(where) / "config.json"
        top, image = JsonObject.of(config, str(where), ProcessorError), _settings(image, folder, "image processor")
        video, model_type = _settings(video, folder, "video processor"), config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise top.error(f"model_type {shown(model_type)} is not supported (known: {', '.join(FAMILIES)})")
        family = FAMILIES[model_type]
        published = _PUBLISHED[family]
        if config.get("vision_config") is None:
            raise top.error("vision_config is missing")
        vision, qwen3 = top.object("vision_config"), family == "qwen3_vl"
        ids = {name: top.integer(name, high=_LARGEST_ID) for name in TOKEN_IDS}
        sizes = {name: _agreed(folder, name, vision, image, video, published.get(name, 2)) for name in SIZE_LIMITS}
        image_budget = _budget(image, published["image"])
        # Qwen2.5-VL ships one preprocessor file for both; Qwen3-VL's budgets mean different things, and its video
        # processor reads `size` alone.
        bounds = dataclasses.replace(video, raw={"size": video.raw.get("size")}) if qwen3 else video
        video_budget = _budget(bounds, published.get("video", image_budget))
        tokens_per_second = 0.0 if qwen3 else vision.number("tokens_per_second", low=1e-3, high=1e3)
        return cls(
            family=family,
            **sizes,
            image_mean=_triple(folder, "image_mean", image, video, published["mean"]),
            image_std=_triple(folder, "image_std", image, video, published["std"]),
            image_min_pixels=image_budget[0],
            image_max_pixels=image_budget[1],
            video_min_pixels=video_budget[0],
            video_max_pixels=video_budget[1],
            tokens_per_second=tokens_per_second,
            vocab_size=_vocab_size(top),
            **ids,
        )


def _vocab_size(top: JsonObject) -> int | None:
    """The decoder's settings stand in text_config, in early Qwen2.5-VL folders at the top."""
    text = top.object("text_config")
    holder = text if text.raw.get("vocab_size") is not None else top
    if holder.raw.get("vocab_size") is None:
        return None
    return holder.integer("vocab_size", low=1, high=_LARGEST_ID)


def _settings(value: Any, folder: str | Path, of: str) -> JsonObject:
    return JsonObject.of({} if value is None else value, f"{folder}: settings of the {of}", ProcessorError)


def _agreed(
    folder: str | Path, name: str, vision: JsonObject, image: JsonObject, video: JsonObject, default: int
) -> int:
    """A size that the vision tower and both processors must share."""
    in_model = "spatial_merge_size" if name == "merge_size" else name
    found = {}
    for who, settings, key in (
        ("config.json vision_config", vision, in_model),
        ("image", image, name),
        ("video", video, name),
    ):
        if settings.raw.get(key) is not None:
            found[who] = settings.integer(key, low=1, high=SIZE_LIMITS[name])
    values = set(found.values())
    if len(values) > 1:
        told = ", ".join(f"{who} {value}" for who, value in found.items())
        raise ProcessorError(f"{folder}: {name} differs between the files of the folder ({told})")
    return values.pop() if values else default


def _budget(settings: JsonObject, default: tuple[int, int]) -> tuple[int, int]:
    """(min, max) area; `size.shortest_edge` and `size.longest_edge` are areas despite their names."""
    size, bounds = settings.object("size"), []
    for flat, edge, high, otherwise in (
        ("min_pixels", "shortest_edge", _LOWER_BOUND, default[0]),
        ("max_pixels", "longest_edge", _UPPER_BOUND, default[1]),
    ):
        inside = size.integer(edge, flat, low=1, high=high, default=otherwise)
        bounds.append(settings.integer(flat, low=1, high=high, default=inside))
    low, high = bounds
    if low > high:
        raise settings.error(f"pixel budget must satisfy 0 < min <= max, got {low} and {high}")
    return low, high


def _triple(
    folder: str | Path, name: str, image: JsonObject, video: JsonObject, default: tuple
) -> tuple[float, float, float]:
    fits = real(1e-6 if name == "image_std" else -_DEEPEST, _DEEPEST)
    given = [settings for settings in (image, video) if settings.raw.get(name) is not None]
    found = {tuple(map(float, settings.list_of(name, fits, "3 numbers, one a channel", 3))) for settings in given}
    if len(found) > 1:
        raise ProcessorError(f"{folder}: {name} differs between image and video preprocessor files")
    return found.pop() if found else default
