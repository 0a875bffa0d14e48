"""Record -> Example: the one place where conversations and media become what the model sees."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mllm4d_jax.encode.chat import Visual, render_chat, rendered_text, video_timestamps
from mllm4d_jax.encode.example import Example, Grid, VideoOptions
from mllm4d_jax.encode.grids import merged_tokens, patchify
from mllm4d_jax.encode.positions import mrope_positions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.files.cache import ClipCache
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.fetched import on_disk
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ImageRule
from mllm4d_jax.media.stored_frames import StoredFrames
from mllm4d_jax.media.video import plan_frames
from mllm4d_jax.qa.errors import MediaError, PlaceholderError, RecordError, TooLongError
from mllm4d_jax.qa.media_paths import named_part
from mllm4d_jax.qa.records import Record

_MIN_FRAMES = 2
_Prompt = tuple[np.ndarray, np.ndarray, str]  # token ids, supervised tokens, text


@dataclasses.dataclass(frozen=True)
class MediaItem:
    """An image or video of a record. Those of a video stay out (None) until the token budget is known to hold."""

    path: str
    visual: Visual
    seconds_per_grid: float = 0.0  # videos only
    frames: np.ndarray | None = None  # u8[T, H, W, 3], resized
    times: np.ndarray | None = None  # f64[T], seconds of a video's frames


@dataclasses.dataclass(frozen=True)
class Media:
    """The images and videos of a record as the model sees them.

    Attributes:
      items: one per image or video, without their frames.
      patches: f32[N, P], as in `Example`; read-only.
    """

    items: tuple[MediaItem, ...]
    patches: np.ndarray


class MediaCache(Protocol):
    """Where the encoder looks for media before it decodes them."""

    def get(self, identity: Hashable) -> Media | None: ...

    def put(self, identity: Hashable, media: Media) -> None: ...


class Encoder(contextlib.AbstractContextManager):
    """Encodes records for one model. Safe to call from several threads; pickles without its decoder processes.

    Attributes:
      unwatched: makes the context in which a file is fetched or decoded. Both have time limits of their own; who sets
        one for the rest can let its clock stand still there.
    """

    def __init__(
        self,
        config: ProcessorConfig,
        tokenizer: Tokenizer,
        options: VideoOptions | None = None,
        max_tokens: int | None = None,
        gen_prefix: str = "",
    ):
        """Checks that tokenizer, config and options belong together.

        Args:
          max_tokens: longest example; longer ones raise TooLongError before any video is decoded. None = no limit.
          gen_prefix: text with which the turn begins that a prompt asks for.

        Raises:
          ProcessorError: placeholder ids differ between tokenizer and config.json.
        """
        tokenizer.check_config(config)
        self.config, self.tokenizer, self.max_tokens = config, tokenizer, max_tokens
        self.gen_prefix = gen_prefix
        self.options = opts = options or VideoOptions()
        self.unwatched: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
        self._clips = ClipCache(opts.cache_gib * 2**30)
        self._pool = DecodePool(opts.decode_timeout_s, opts.decode_threads)
        self._sample = SampleRule(opts.sampling, opts.num_frames, opts.fps)
        self._resize = opts.resize_for(config)

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
        result = self.encode_group([record], add_generation_prompt=add_generation_prompt)[0]
        if isinstance(result, RecordError):
            raise result
        return result

    def encode_group(
        self, records: Sequence[Record], *, add_generation_prompt: bool = False, cache: MediaCache | None = None
    ) -> list[Example | RecordError]:
        """Encodes records about the same media, which are decoded once; all examples hold the same patches array.

        A record that cannot be used costs only itself, media that cannot be read cost every record. What is returned
        for a record is what `encode` would return or raise for it alone.

        Args:
          records: with the same images and videos in the same order.
          add_generation_prompt: as in `encode`.
          cache: media read before; what is read here is put into it.

        Returns:
          An Example or a RecordError (naming the key) for each record.

        Raises:
          ValueError: the records name different media.
        """
        refused: dict[int, RecordError] = {}

        def attempt(step: Callable[[int], Any]) -> dict[int, Any]:
            """What the step gives for the number of each record that is still good; one that it refuses is no more."""
            made = {}
            for i in [i for i in range(len(records)) if i not in refused]:
                try:
                    made[i] = step(i)
                except RecordError as error:
                    refused[i] = error.with_key(records[i].key)
            return made

        # Renders without media first: a malformed conversation is refused before any file is opened.
        attempt(lambda i: render_chat(records[i].messages, self.config.family, form=self.config.chat))
        parts = attempt(lambda i: media_parts(records[i]))
        identities = {media_identity(records[i]) for i in parts}
        if len(identities) > 1:
            raise ValueError(f"{records[0].key} and its group name different media: {sorted(identities, key=str)}")
        if not parts:
            return [refused[i] for i in range(len(records))]
        wanted, identity = next(iter(parts.values())), identities.pop()
        media = cache.get(identity) if cache is not None else None
        try:
            prompts = None
            if media is None:
                with self._on_disk(wanted) as parts:
                    plan = [self._plan(part) for part in parts]
                    if all(item is not None for item in plan):
                        prompts = attempt(lambda i: self._prompt(records[i], plan, add_generation_prompt))
                    if len(refused) == len(records):
                        return [refused[i] for i in range(len(records))]
                    media = self._load_all(parts, plan)
                if [i.visual for i in media.items] != [i.visual for i in plan if i is not None]:
                    prompts = None  # a file did not say how long it is, or not truly
            if prompts is None:
                prompts = attempt(lambda i: self._prompt(records[i], media.items, add_generation_prompt))
        except RecordError as error:  # of the media: everybody's
            return [refused.get(i) or error.with_key(record.key) for i, record in enumerate(records)]
        if cache is not None:
            cache.put(identity, media)
        made = attempt(lambda i: self._assemble(records[i].key, prompts[i], media))
        return [refused.get(i) or made[i] for i in range(len(records))]

    @contextlib.contextmanager
    def _on_disk(self, parts: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
        """Yield the parts with files of this machine, copies of those in a bucket; raise as `media.fetched.on_disk`."""
        with contextlib.ExitStack() as held:

            def copied(part: Mapping[str, Any]) -> Mapping[str, Any]:
                path = part.get("path")
                if path is None:
                    return part
                with self.unwatched():
                    return {**part, "path": held.enter_context(on_disk(path, self._clips, part["type"]))}

            yield [copied(part) for part in parts]

    def _load_all(self, parts: Sequence[Mapping[str, Any]], plan: Sequence[MediaItem | None]) -> Media:
        """Decodes what was planned."""
        items, patches = [], []
        for part, planned in zip(parts, plan, strict=True):
            item = self._load(part, planned)
            made, thw = patchify(item.frames, self.config)
            if thw != item.visual.grid.thw:
                told = item.visual.grid.thw
                raise PlaceholderError(f"{item.path}: pixels make a grid of {thw}, the prompt holds {told}")
            patches.append(made)
            items.append(dataclasses.replace(item, frames=None))
        c = self.config
        empty = np.zeros((0, 3 * c.temporal_patch_size * c.patch_size**2), np.float32)
        joined = patches[0] if len(patches) == 1 else np.concatenate(patches) if patches else empty
        joined.setflags(write=False)
        return Media(tuple(items), joined)

    def _plan(self, part: Mapping[str, Any]) -> MediaItem | None:
        """What an image or video will become, before a video is decoded; None when its file does not say."""
        if part["type"] == "image":
            return self._image_item(part["path"])
        sample = self._sample_of(part)
        if "frames" in part:
            stored = part["frames"]
            picked, size = stored.plan(sample, self._resize)
            times = np.asarray(stored.times, np.float64)[picked]
            return self._video_item(stored.name, times, stored.source_fps, stored.sampled_of(sample), size)
        path = part["path"]
        with self.unwatched():
            info = self._pool.probe(path)
        if info.frames < _MIN_FRAMES:
            return None  # decoding finds out what is wrong
        indices, size = plan_frames(path, info, sample, self._resize)
        total = len(info.times[sample.part(info.times)])
        return self._video_item(path, info.times[indices], info.fps, total, size)

    def _load(self, part: Mapping[str, Any], planned: MediaItem | None) -> MediaItem:
        """The item with its frames."""
        if part["type"] == "image":
            return planned
        sample = self._sample_of(part)
        if "frames" in part:
            path, clip = part["frames"].name, part["frames"].read(sample, self._resize)
        else:
            path = part["path"]
            with self.unwatched():
                clip = self._pool.read(path, sample, self._resize)
        item = self._video_item(path, clip.times, clip.source_fps, clip.total_frames, clip.frames.shape[1:3])
        return dataclasses.replace(item, frames=self.shown_frames(path, clip.frames))

    def _sample_of(self, part: Mapping[str, Any]) -> SampleRule:
        """The rule, bound to the part of the video that the record means."""
        start, end = part.get("span", (None, None))
        return dataclasses.replace(self._sample, start=start, end=end)

    def shown_frames(self, path: str, frames: np.ndarray) -> np.ndarray:
        """Return a clip's frames u8[T, H, W, 3] as the model is to see them. For subclasses: the controls of `eval`."""
        del path
        return frames

    def _image_item(self, path: str) -> MediaItem:
        c = self.config
        low = self.options.image_min_pixels or c.image_min_pixels
        high = self.options.image_max_pixels or c.image_max_pixels
        with self.unwatched():
            image = self._pool.image(path, ImageRule(c.factor, low, high))
        grid = Grid("image", 1, image.shape[0] // c.patch_size, image.shape[1] // c.patch_size)
        return MediaItem(path, Visual(grid), frames=image[None])

    def _video_item(self, path: str, times: np.ndarray, fps: float, total: int, size: tuple[int, int]) -> MediaItem:
        c = self.config
        if len(times) < _MIN_FRAMES:
            message = f"{path}: {len(times)} of {total} frames were sampled, at least {_MIN_FRAMES} are needed"
            raise MediaError(message, "one_frame")
        t = -(-len(times) // c.temporal_patch_size)
        grid = Grid("video", t, size[0] // c.patch_size, size[1] // c.patch_size)
        timestamps = video_timestamps(times, c.temporal_patch_size)
        sampled_fps = len(times) / total * fps
        return MediaItem(path, Visual(grid, timestamps), c.temporal_patch_size / sampled_fps, times=times)

    def _prompt(self, record: Record, items: Sequence[MediaItem], add_generation_prompt: bool) -> _Prompt:
        pieces = render_chat(
            record.messages,
            self.config.family,
            visuals=[i.visual for i in items],
            merge_size=self.config.merge_size,
            add_generation_prompt=add_generation_prompt,
            gen_prefix=self.gen_prefix,
            outer_markers=self.options.outer_markers,
            form=self.config.chat,
        )
        if self.max_tokens is not None and (least := self.tokenizer.least_tokens(pieces)) > self.max_tokens:
            raise self._too_long(least, items, "at least ")  # without tokenising a text of megabytes
        tokens, supervised = self.tokenizer.encode_pieces(pieces)
        if self.max_tokens is not None and len(tokens) > self.max_tokens:
            raise self._too_long(len(tokens), items)
        return tokens, supervised, rendered_text(pieces)

    def _too_long(self, needed: int, items: Sequence[MediaItem], bound: str = "") -> TooLongError:
        grids, side = [i.visual.grid for i in items], self.config.patch_size
        visual = sum(merged_tokens(g, self.config.merge_size) for g in grids)
        shapes = ", ".join(f"{g.modality} {g.t}x{g.h * side}x{g.w * side}px" for g in grids)
        advice = "raise the token limit or split the conversation"
        if visual:
            advice = "take fewer frames (num_frames, fps), lower the pixel budget (max_pixels) or raise the token limit"
        return TooLongError(
            f"needs {bound}{needed} tokens ({visual} of images and videos{': ' + shapes if shapes else ''}, "
            f"{needed - visual} of text and markers) but the limit is {self.max_tokens}: {advice}"
        )

    def _assemble(self, key: str, prompt: _Prompt, media: Media) -> Example:
        (tokens, supervised, text), c, items = prompt, self.config, media.items
        grids = tuple(i.visual.grid for i in items)
        positions, delta = mrope_positions(
            tokens,
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
            tokens=tokens,
            positions=positions,
            rope_delta=delta,
            supervised=supervised,
            patches=media.patches,
            grids=grids,
            timestamps=tuple(i.visual.timestamps for i in items if i.visual.grid.modality == "video"),
            text=text,
        )

    def close(self) -> None:
        """Ends the decoder processes; the encoder stays usable."""
        self._pool.close()

    def __exit__(self, *_) -> None:
        self.close()


def media_parts(record: Record) -> list[Mapping[str, Any]]:
    """The record's images and videos, in reading order. Raises PlaceholderError for one without a file or frames."""
    parts = [
        p for m in record.messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] != "text"
    ]
    for part in parts:
        if part["type"] == "video" and isinstance(part.get("frames"), StoredFrames):
            continue
        if not isinstance(part.get("path"), str) or not part["path"]:
            raise PlaceholderError(f"an {part['type']} part has no file: {shown(dict(part))}")
    return parts


def media_identity(record: Record) -> tuple[tuple[str, str], ...]:
    """(kind, path or name) of the record's media, in reading order: equal for records that share them all.

    Behind the name of a video stands which part of it is meant, if not all of it.
    """
    return tuple((p["type"], named_part(media_name(p), p.get("span"))) for p in media_parts(record))


def media_name(part: Mapping[str, Any]) -> str:
    """Return the path of an image or video, or the name of frames that came with the record."""
    return part["frames"].name if "frames" in part else part["path"]
