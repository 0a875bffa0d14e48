"""Record -> Example: the one place where conversations and media become what the model sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from mllm4d_jax.processing.chat import Visual, render_chat, rendered_text, video_timestamps
from mllm4d_jax.processing.config import ProcessorConfig
from mllm4d_jax.processing.decode_pool import DecodePool
from mllm4d_jax.processing.errors import (
    MediaError,
    PlaceholderError,
    ProcessorError,
    RecordError,
    TooLongError,
)
from mllm4d_jax.processing.example import Example, Grid, Record, VideoOptions
from mllm4d_jax.processing.patches import patchify
from mllm4d_jax.processing.positions import mrope_positions
from mllm4d_jax.processing.resize import ResizeRule, SizeError, image_size, resize_bicubic
from mllm4d_jax.processing.sampling import SampleRule, SamplingError
from mllm4d_jax.processing.tokenizer import Tokenizer
from mllm4d_jax.processing.video import VideoClip, VideoInfo, probe, read_image, read_video

__all__ = [
    "Encoder",
    "Example",
    "Grid",
    "MediaError",
    "PlaceholderError",
    "ProcessorError",
    "Record",
    "RecordError",
    "TooLongError",
    "VideoOptions",
]

_MIN_FRAMES = 2
# The paper's training: every frame between 28 x 28 and 224 x 224 pixels.
_FRAME_BUDGET = (784, 50176)


@dataclasses.dataclass(frozen=True)
class _Item:
    """An image or video of a record. `frames` stay out (None) until the token budget is known to hold."""

    path: str
    visual: Visual
    seconds_per_grid: float = 0.0  # videos only
    frames: np.ndarray | None = None  # u8[T, H, W, 3], resized


@dataclasses.dataclass(frozen=True)
class _Prompt:
    tokens: np.ndarray
    supervised: np.ndarray
    text: str


class Encoder:
    """Encodes records for one model. Safe to call from several threads; pickles without its decoder processes."""

    def __init__(
        self,
        config: ProcessorConfig,
        tokenizer: Tokenizer,
        options: VideoOptions | None = None,
        max_tokens: int | None = None,
        *,
        add_vision_id: bool = False,
        isolate_decoder: bool = True,
    ):
        """Checks that tokenizer, config and options belong together.

        Args:
          max_tokens: longest example; longer ones raise TooLongError before any video is decoded. None = no limit.
          add_vision_id: number images and videos in the prompt ("Video 1: ").
          isolate_decoder: decode in processes that are killed at `options.decode_timeout_s`. Turn it off only inside a
            process whose owner kills it when it hangs: the time limit is not enforced then.

        Raises:
          ProcessorError: placeholder ids differ between tokenizer and config.json.
        """
        tokenizer.check_config(config)
        self.config, self.tokenizer, self.max_tokens = config, tokenizer, max_tokens
        self.options = options or VideoOptions()
        self._add_vision_id = add_vision_id
        opts = self.options
        self._pool = DecodePool(opts.decode_timeout_s, opts.decode_threads) if isolate_decoder else None
        self._sample = SampleRule(opts.sampling, opts.num_frames, opts.fps, opts.min_frames)
        self._resize = _resize_rule(config, opts)

    def encode(self, record: Record, *, add_generation_prompt: bool = False) -> Example:
        """Reads the record's media, renders and tokenises its conversation once, and computes its positions.

        The number of tokens is known from the files' own headers, so a record over budget is refused before its videos
        are decoded. Nothing is ever cut.

        Args:
          add_generation_prompt: end with the header of an assistant turn.

        Raises:
          RecordError: anything wrong with the record, naming its key; MediaError, PlaceholderError and TooLongError are
            kinds of it.
        """
        try:
            return self._encode(record, add_generation_prompt)
        except RecordError as error:
            raise error.with_key(record.key) from error

    def _encode(self, record: Record, add_generation_prompt: bool) -> Example:
        # Renders without media first: a malformed conversation is refused before any file is opened.
        render_chat(record.messages, self.config.family)
        plan = [self._plan(kind, path) for kind, path in _media_parts(record)]
        prompt = None
        if all(item is not None for item in plan):
            prompt = self._prompt(record, plan, add_generation_prompt)
        items = [self._load(kind, path, item) for (kind, path), item in zip(_media_parts(record), plan, strict=True)]
        if prompt is None or [i.visual for i in items] != [i.visual for i in plan]:
            # A file did not say how long it is, or not truly.
            prompt = self._prompt(record, items, add_generation_prompt)
        return self._assemble(record.key, prompt, items)

    def _plan(self, kind: str, path: str) -> _Item | None:
        """What an image or video will become, before a video is decoded; None when its file does not say."""
        if kind == "image":
            return self._image_item(path)
        info = self._probe(path)
        if info.frames is None or info.frames < _MIN_FRAMES:
            return None  # decoding finds out what is wrong
        try:
            indices = self._sample.indices(info.frames, info.fps)
            size = self._resize.size(len(indices), info.height, info.width)
        except SamplingError as error:
            raise MediaError(f"{path}: {error}", "too_few_frames") from error
        except SizeError as error:
            raise MediaError(f"{path}: {error}", "bad_size") from error
        return self._video_item(path, indices, info.fps, info.frames, size)

    def _load(self, kind: str, path: str, planned: _Item | None) -> _Item:
        """The item with its frames."""
        if kind == "image":
            return planned
        clip = self._read(path)
        item = self._video_item(path, clip.indices, clip.source_fps, clip.total_frames, clip.frames.shape[1:3])
        return dataclasses.replace(item, frames=clip.frames)

    def _image_item(self, path: str) -> _Item:
        image, c = read_image(path), self.config
        low = self.options.image_min_pixels or c.image_min_pixels
        high = self.options.image_max_pixels or c.image_max_pixels
        try:
            size = image_size(*image.shape[:2], c.factor, low, high)
        except SizeError as error:
            raise MediaError(f"{path}: {error}", "bad_size") from error
        grid = Grid("image", 1, size[0] // c.patch_size, size[1] // c.patch_size)
        return _Item(path, Visual(grid), frames=resize_bicubic(image, *size)[None])

    def _video_item(self, path: str, indices: np.ndarray, fps: float, total: int, size: tuple[int, int]) -> _Item:
        c = self.config
        if len(indices) < _MIN_FRAMES:
            raise MediaError(
                f"{path}: {len(indices)} of {total} frames were sampled, at least 2 are needed", "one_frame"
            )
        grid = Grid(
            "video", -(-len(indices) // c.temporal_patch_size), size[0] // c.patch_size, size[1] // c.patch_size
        )
        timestamps = video_timestamps(indices, fps, c.temporal_patch_size)
        sampled_fps = len(indices) / total * fps
        return _Item(path, Visual(grid, timestamps), c.temporal_patch_size / sampled_fps)

    def _prompt(self, record: Record, items: Sequence[_Item], add_generation_prompt: bool) -> _Prompt:
        pieces = render_chat(
            record.messages,
            self.config.family,
            visuals=[i.visual for i in items],
            merge_size=self.config.merge_size,
            add_generation_prompt=add_generation_prompt,
            add_vision_id=self._add_vision_id,
            outer_markers=self.options.outer_markers,
        )
        encoding, supervised = self.tokenizer.encode_pieces(pieces)
        if self.max_tokens is not None and len(encoding.ids) > self.max_tokens:
            raise self._too_long(len(encoding.ids), items)
        return _Prompt(encoding.ids, supervised, rendered_text(pieces))

    def _too_long(self, needed: int, items: Sequence[_Item]) -> TooLongError:
        visual = sum(i.visual.grid.t * i.visual.grid.h * i.visual.grid.w for i in items) // self.config.merge_size**2
        shapes = ", ".join(
            f"{g.modality} {g.t}x{g.h * self.config.patch_size}x{g.w * self.config.patch_size}px"
            for g in (i.visual.grid for i in items)
        )
        advice = "raise the token limit or split the conversation"
        if visual:
            advice = "take fewer frames (num_frames, fps), lower the pixel budget (max_pixels) or raise the token limit"
        return TooLongError(
            f"needs {needed} tokens ({visual} of images and videos{': ' + shapes if shapes else ''}, "
            f"{needed - visual} of text and markers) but the limit is {self.max_tokens}: {advice}"
        )

    def _assemble(self, key: str, prompt: _Prompt, items: Sequence[_Item]) -> Example:
        c = self.config
        parts, grids = [], tuple(i.visual.grid for i in items)
        for item in items:
            patches, thw = patchify(item.frames, c)
            if thw != item.visual.grid.thw:
                raise PlaceholderError(
                    f"{item.path}: pixels make a grid of {thw}, the prompt holds {item.visual.grid.thw}"
                )
            parts.append(patches)
        empty = np.zeros((0, 3 * c.temporal_patch_size * c.patch_size**2), np.float32)
        positions, delta = mrope_positions(
            prompt.tokens,
            grids,
            image_token_id=c.image_token_id,
            video_token_id=c.video_token_id,
            merge_size=c.merge_size,
            family=c.family,
            second_per_grid=[i.seconds_per_grid for i in items if i.visual.grid.modality == "video"],
            tokens_per_second=c.tokens_per_second,
            rule=self.options.position_rule,
        )
        return Example(
            key=key,
            tokens=prompt.tokens,
            positions=positions,
            rope_delta=delta,
            supervised=prompt.supervised,
            patches=np.concatenate(parts) if parts else empty,
            grids=grids,
            timestamps=tuple(i.visual.timestamps for i in items if i.visual.grid.modality == "video"),
            text=prompt.text,
        )

    def _probe(self, path: str) -> VideoInfo:
        return self._pool.probe(path) if self._pool else probe(path, self.options.decode_threads)

    def _read(self, path: str) -> VideoClip:
        if self._pool:
            return self._pool.read(path, self._sample, self._resize)
        return read_video(path, self._sample, self._resize, self.options.decode_threads)

    def close(self) -> None:
        """Ends the decoder processes; the encoder stays usable."""
        if self._pool:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _media_parts(record: Record) -> list[tuple[str, str]]:
    """(kind, path) of the record's images and videos, in reading order."""
    parts = [
        p for m in record.messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] != "text"
    ]
    for part in parts:
        if not isinstance(part.get("path"), str) or not part["path"]:
            raise PlaceholderError(f"an {part['type']} part has no file: {dict(part)!r:.120}")
    return [(p["type"], p["path"]) for p in parts]


def _resize_rule(config: ProcessorConfig, options: VideoOptions) -> ResizeRule:
    """The clip's resize rule with its own budget where the options leave it open."""
    default: tuple[int | None, int | None]
    if options.resize_rule == "per_frame":
        default = _FRAME_BUDGET
    elif options.resize_rule == "total":
        default = (config.video_min_pixels, config.video_max_pixels)
    else:
        default = (None, None)
    low = default[0] if options.min_pixels is None else options.min_pixels
    high = default[1] if options.max_pixels is None else options.max_pixels
    if low is not None and high is not None and low > high:
        raise ProcessorError(f"resize rule {options.resize_rule!r}: min_pixels {low} exceeds max_pixels {high}")
    return ResizeRule(options.resize_rule, config.factor, config.temporal_patch_size, low, high)
