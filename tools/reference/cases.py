"""The inputs of the recorded cases: token rows with images and videos at their places, as transformers takes them.

Every case is a few rows of segments. Words become real token ids when the model folder has a tokenizer.json, random ids
otherwise; pixels are random but fixed by the seed. Layout of a prompt: as the checkpoints were released with (Qwen3-VL:
one marked run per temporal patch with its timestamp before it; Qwen2.5-VL: one marked run per clip).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.encode.processor_config import ProcessorConfig

IGNORED = -100  # label of a position that is no training target


@dataclass(frozen=True)
class PromptRow:
    """One unpadded sample.

    Attributes:
      tokens: i64[S].
      supervised: bool[S], the training targets.
      media: its images and videos in reading order: grid, f32[t*h*w, C*tp*p*p] patches, seconds per temporal patch.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    media: tuple[tuple[Grid, np.ndarray, float], ...]


@dataclass(frozen=True)
class Text:
    """Words; `answer` marks them as training targets."""

    text: str
    answer: bool = False


@dataclass(frozen=True)
class Pixels:
    """An image or video by its grid: t temporal patches of h x w *merged* tokens, `seconds` apart."""

    modality: str
    t: int
    h: int
    w: int
    seconds: float = 1.0


ASK = Text("<|im_start|>user\n")
TURN = Text("<|im_end|>\n<|im_start|>assistant\n")
END = Text("It moves to the left , about 1.2 metres .<|im_end|>\n", answer=True)
_BATCH = (
    (ASK, Pixels("video", 2, 3, 2), Text("and"), Pixels("image", 1, 2, 3), Text("Compare ."), TURN, END),
    (ASK, Pixels("image", 1, 3, 2), TURN, END),
)
_IMAGES = (Pixels("image", 1, 2, 2), Pixels("image", 1, 1, 3))
_VIDEOS = (Pixels("video", 2, 3, 2, 0.4), Pixels("video", 1, 2, 2))
_MULTI = ((ASK, *_IMAGES, Text("then"), *_VIDEOS, TURN, END), (Pixels("video", 1, 1, 2), TURN, END))
_DISTANCE = Text("How far does the camera move between frame 3 and frame 26 of 31 ?\n", answer=True)
# name -> (side of the padding, rows of segments)
CASES = MappingProxyType(
    {
        "text": ("left", ((_DISTANCE, END),)),
        "image": ("left", ((ASK, Pixels("image", 1, 4, 3), Text("What is in front of the camera ?"), TURN, END),)),
        # Longer, in Qwen2.5-VL's time, than the text after it: some versions of transformers then go back in time.
        "video": ("left", ((ASK, Pixels("video", 3, 3, 5, 10.4), Text("Which way does it move ?"), TURN, END),)),
        "batch": ("left", _BATCH),
        "multi": ("right", _MULTI),
    }
)


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts for a model: what its folder says about them, and the seed of everything made up."""

    family: str  # "qwen3_vl" | "qwen2_5_vl"
    ids: tuple[int, int, int, int]  # image, video, vision_start, vision_end
    merge_size: int
    patch_width: int  # C*tp*p*p
    plain_ids: np.ndarray  # ids that random words may take
    pad_id: int
    tokenizer: object | None
    seed: int

    @classmethod
    def from_folder(cls, path: str | Path, seed: int) -> PromptMaker:
        """Read config.json and, where present, tokenizer.json. Raises ProcessorError for another family."""
        import tokenizers

        folder, processor = Path(path), ProcessorConfig.from_folder(path)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text, vision = config.get("text_config", config), config["vision_config"]
        ids = tuple(getattr(processor, f"{name}_token_id") for name in ("image", "video", "vision_start", "vision_end"))
        named = [text.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
        special = {*ids, *named}
        vocabulary = np.array([i for i in range(min(ids)) if i not in special])
        if len(vocabulary) < 16:
            vocabulary = np.array([i for i in range(text["vocab_size"]) if i not in special])
        file = folder / "tokenizer.json"
        channels = vision.get("in_channels", vision.get("in_chans", 3))
        return cls(
            family=processor.family,
            ids=ids,
            merge_size=processor.merge_size,
            patch_width=channels * processor.temporal_patch_size * processor.patch_size**2,
            plain_ids=vocabulary,
            pad_id=next((token for token in named if isinstance(token, int)), int(vocabulary[0])),
            tokenizer=tokenizers.Tokenizer.from_file(str(file)) if file.exists() else None,
            seed=seed,
        )

    def row(self, segments: Sequence[Text | Pixels], rng: np.random.Generator) -> PromptRow:
        """Return tokens and pixels of one sample."""
        tokens, supervised, media = [], [], []
        for segment in segments:
            new = self._words(segment.text, rng) if isinstance(segment, Text) else self._placeholders(segment, rng)
            tokens += new
            supervised += [isinstance(segment, Text) and segment.answer] * len(new)
            if isinstance(segment, Pixels):
                grid = Grid(segment.modality, segment.t, segment.h * self.merge_size, segment.w * self.merge_size)
                patches = rng.uniform(-1, 1, (grid.t * grid.h * grid.w, self.patch_width)).astype(np.float32)
                media.append((grid, patches, segment.seconds))
        return PromptRow(np.array(tokens, np.int64), np.array(supervised, bool), tuple(media))

    def _words(self, text: str, rng: np.random.Generator) -> list[int]:
        if self.tokenizer is not None:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return rng.choice(self.plain_ids, max(1, len(text.split()))).tolist()

    def _placeholders(self, visual: Pixels, rng: np.random.Generator) -> list[int]:
        image, video, start, end = self.ids
        pad, area = (image if visual.modality == "image" else video), visual.h * visual.w
        if visual.modality == "image" or self.family == "qwen2_5_vl":
            return [start, *[pad] * (visual.t * area), end]
        tokens = []
        for frame in range(visual.t):
            stamp = f"<{frame * visual.seconds + visual.seconds / 4:.1f} seconds>"
            tokens += [*self._words(stamp, rng), start, *[pad] * area, end]
        return tokens


def make_case(prompts: PromptMaker, name: str) -> tuple[str, list[PromptRow]]:
    """Return (side of the padding, rows) of a named case; the same for the same seed."""
    side, rows = CASES[name]
    rng = np.random.default_rng([prompts.seed, list(CASES).index(name)])
    return side, [prompts.row(segments, rng) for segments in rows]


def batch(prompts: PromptMaker, rows: Sequence[PromptRow], side: str) -> dict[str, np.ndarray]:
    """Return the arrays a transformers model takes, under its names.

    Returns:
      `input_ids`, `attention_mask`, `mm_token_type_ids` (0 text, 1 image, 2 video) and `labels`, i64[B, S]; for
      images and for videos `pixel_values[_videos]` f32[N, C*tp*p*p] and `{image,video}_grid_thw` i64[n, 3], in reading
      order over the whole batch; `second_per_grid_ts` f32[n] for Qwen2.5-VL videos.
    """
    length = max(len(row.tokens) for row in rows)
    tokens = np.full((len(rows), length), prompts.pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    labels = np.full((len(rows), length), IGNORED, np.int64)
    for index, row in enumerate(rows):
        place = slice(length - len(row.tokens), length) if side == "left" else slice(0, len(row.tokens))
        tokens[index, place], mask[index, place] = row.tokens, 1
        labels[index, place] = np.where(row.supervised, row.tokens, IGNORED)
    types = np.where(tokens == prompts.ids[0], 1, np.where(tokens == prompts.ids[1], 2, 0)) * mask
    arrays = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": types, "labels": labels}
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        media = [entry for row in rows for entry in row.media if entry[0].modality == modality]
        if media:
            grids, patches, seconds = zip(*media, strict=True)
            arrays[f"{modality}_grid_thw"] = np.array([grid.thw for grid in grids], np.int64)
            arrays[pixels] = np.concatenate(patches)
            if modality == "video" and prompts.family == "qwen2_5_vl":
                arrays["second_per_grid_ts"] = np.array(seconds, np.float32)
    return arrays


def example_row(example: Example) -> PromptRow:
    """Return the row of an encoded record: its tokens, its targets, and its patches split by image and video."""
    media, first, stamps = [], 0, iter(example.timestamps)
    for grid in example.grids:
        end, times = first + grid.t * grid.h * grid.w, next(stamps) if grid.modality == "video" else ()
        seconds = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
        media.append((grid, example.patches[first:end], seconds))
        first = end
    return PromptRow(np.asarray(example.tokens, np.int64), np.asarray(example.supervised, bool), tuple(media))
