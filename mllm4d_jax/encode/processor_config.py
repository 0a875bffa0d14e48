"""The numbers of a model's processor, read from its Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mllm4d_jax.qa.errors import ProcessorError

FAMILIES = {"qwen3_vl": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl", "qwen2_5_vl": "qwen2_5_vl"}
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

_SIZES = ("patch_size", "temporal_patch_size", "merge_size")
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

    @property
    def factor(self) -> int:
        """Pixel side of one merged token; frame sides are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Reads config.json and, where present, the preprocessor files.

        Which file counts is as in transformers 5: settings nested in processor_config.json; where it has none, those of
        preprocessor_config.json for images, and for videos those of video_preprocessor_config.json or, without that
        one, of preprocessor_config.json too. One of them counts, whole; the others are not looked at. Token ids always
        come from config.json.

        Raises:
          ProcessorError: config.json missing or not of a supported family, a key missing, or settings of images,
            videos and config.json that contradict each other.
        """
        folder = Path(path)
        config = _read_json(folder / "config.json")
        if config is None:
            raise ProcessorError(f"{folder}/config.json not found: give the folder of a Hugging Face checkpoint")
        both = _read_json(folder / "processor_config.json") or {}
        image, video = both.get("image_processor"), both.get("video_processor")
        if image is None:
            image = _read_json(folder / "preprocessor_config.json")
        for older in ("video_preprocessor_config.json", "preprocessor_config.json"):
            video = _read_json(folder / older) if video is None else video
        return cls.of(config, folder, image, video)

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
        folder, where = where, Path(where) / "config.json"
        image, video = image or {}, video or {}
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise ProcessorError(f"{where}: model_type {model_type!r} is not supported (known: {', '.join(FAMILIES)})")
        family = FAMILIES[model_type]
        published, vision = _PUBLISHED[family], config.get("vision_config")
        if not isinstance(vision, dict):
            raise ProcessorError(f"{where}: vision_config is missing")
        ids = {}
        for name in TOKEN_IDS:
            if not isinstance(config.get(name), int):
                raise ProcessorError(f"{where}: {name} is missing")
            ids[name] = config[name]
        vision = vision | {"merge_size": vision.get("spatial_merge_size")}
        sizes = {n: _agreed(folder, n, vision.get(n), image, video, published.get(n, 2)) for n in _SIZES}
        image_budget = _budget(folder, image, published["image"])
        # Qwen2.5-VL ships one preprocessor file for both; Qwen3-VL's budgets mean different things, and its video
        # processor reads `size` alone.
        bounds = video if family == "qwen2_5_vl" else {"size": video.get("size")}
        video_budget = _budget(folder, bounds, published.get("video", image_budget))
        tokens_per_second = vision.get("tokens_per_second", 0) if family == "qwen2_5_vl" else 0
        if family == "qwen2_5_vl" and not tokens_per_second:
            raise ProcessorError(f"{where}: vision_config.tokens_per_second is missing")
        return cls(
            family=family,
            **sizes,
            image_mean=_triple(folder, "image_mean", image, video, published["mean"]),
            image_std=_triple(folder, "image_std", image, video, published["std"]),
            image_min_pixels=image_budget[0],
            image_max_pixels=image_budget[1],
            video_min_pixels=video_budget[0],
            video_max_pixels=video_budget[1],
            tokens_per_second=float(tokens_per_second),
            **ids,
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProcessorError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ProcessorError(f"{path}: expected a JSON object")
    return value


def _agreed(folder: Path, name: str, in_model: int | None, image: Mapping, video: Mapping, default: int) -> int:
    """A size that the vision tower and both processors must share."""
    found = {"config.json vision_config": in_model, "image": image.get(name), "video": video.get(name)}
    values = {v for v in found.values() if v is not None}
    if len(values) > 1:
        told = ", ".join(f"{k} {v}" for k, v in found.items() if v is not None)
        raise ProcessorError(f"{folder}: {name} differs between the files of the folder ({told})")
    value = values.pop() if values else default
    if not isinstance(value, int) or value < 1:
        raise ProcessorError(f"{folder}: {name} must be a positive integer, got {value!r}")
    return value


def _budget(folder: Path, settings: Mapping[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    """(min, max) area; `size.shortest_edge` and `size.longest_edge` are areas despite their names."""
    size = settings.get("size") or {}
    low = _first(settings.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"), default[0])
    high = _first(settings.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"), default[1])
    if not 0 < low <= high:
        raise ProcessorError(f"{folder}: pixel budget must satisfy 0 < min <= max, got {low} and {high}")
    return int(low), int(high)


def _triple(folder: Path, name: str, image: Mapping, video: Mapping, default: tuple) -> tuple[float, float, float]:
    found = {tuple(float(v) for v in s[name]) for s in (image, video) if s.get(name) is not None}
    if len(found) > 1:
        raise ProcessorError(f"{folder}: {name} differs between image and video preprocessor files")
    value = found.pop() if found else default
    if len(value) != 3:
        raise ProcessorError(f"{folder}: {name} must have 3 values, got {value}")
    return value


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)
