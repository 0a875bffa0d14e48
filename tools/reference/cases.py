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

IGNORED = -100  # label of a position that is no training target


@dataclass(frozen=True)
class Item:
    """One image or video: its grid (t, h, w) in patches, f32[t*h*w, C*tp*p*p] patches, seconds per temporal patch."""

    modality: str
    grid: tuple[int, int, int]
    patches: np.ndarray
    seconds: float = 1.0


@dataclass(frozen=True)
class Row:
    """One unpadded sample: i64[S] tokens, bool[S] training targets, and its images and videos in reading order."""

    tokens: np.ndarray
    supervised: np.ndarray
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Text:
    """Words; `answer` marks them as training targets."""

    text: str
    answer: bool = False


@dataclass(frozen=True)
class Visual:
    """An image or video by its grid: t temporal patches of h x w *merged* tokens, `seconds` apart."""

    modality: str
    t: int
    h: int
    w: int
    seconds: float = 1.0


ASK = Text("<|im_start|>user\n")
TURN = Text("<|im_end|>\n<|im_start|>assistant\n")
END = Text("It moves to the left , about 1.2 metres .<|im_end|>\n", answer=True)
CASES = MappingProxyType(
    {
        "text": (
            "left",
            ((Text("How far does the camera move between frame 3 and frame 26 of 31 ?\n", answer=True), END),),
        ),
        "image": ("left", ((ASK, Visual("image", 1, 4, 3), Text("What is in front of the camera ?"), TURN, END),)),
        "video": ("left", ((ASK, Visual("video", 3, 3, 5, 0.8), Text("Which way does it move ?"), TURN, END),)),
        "batch": (
            "left",
            (
                (ASK, Visual("video", 2, 3, 2), Text("and"), Visual("image", 1, 2, 3), Text("Compare ."), TURN, END),
                (ASK, Visual("image", 1, 3, 2), TURN, END),
            ),
        ),
        "multi": (
            "right",
            (
                (
                    ASK,
                    Visual("image", 1, 2, 2),
                    Visual("image", 1, 1, 3),
                    Text("then"),
                    Visual("video", 2, 3, 2, 0.4),
                    Visual("video", 1, 2, 2),
                    TURN,
                    END,
                ),
                (Visual("video", 1, 1, 2), TURN, END),
            ),
        ),
    }
)


@dataclass(frozen=True)
class Prompts:
    """What a model folder says about its prompts, and the seed of everything made up."""

    family: str  # "qwen3_vl" | "qwen2_5_vl"
    ids: tuple[int, int, int, int]  # image, video, vision_start, vision_end
    merge_size: int
    patch_width: int  # C*tp*p*p
    plain_ids: np.ndarray  # ids that random words may take
    pad_id: int
    tokenizer: object | None
    seed: int

    @classmethod
    def from_folder(cls, path: str | Path, seed: int) -> Prompts:
        """Reads config.json and, where present, tokenizer.json. Raises ValueError for another family of models."""
        import tokenizers

        folder = Path(path)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = {"qwen3_vl": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl", "qwen2_5_vl": "qwen2_5_vl"}.get(
            config["model_type"]
        )
        if family is None:
            raise ValueError(
                f"{folder}: model_type '{config['model_type']}' is not Qwen3-VL, Qwen3-VL-MoE or Qwen2.5-VL"
            )
        text, vision = config.get("text_config", config), config["vision_config"]
        ids = tuple(config[f"{name}_token_id"] for name in ("image", "video", "vision_start", "vision_end"))
        special = {*ids, text.get("bos_token_id"), text.get("eos_token_id"), text.get("pad_token_id")}
        vocabulary = np.array([i for i in range(min(ids)) if i not in special])
        if len(vocabulary) < 16:
            vocabulary = np.array([i for i in range(text["vocab_size"]) if i not in special])
        pads = (text.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id"))
        file = folder / "tokenizer.json"
        channels = vision.get("in_channels", vision.get("in_chans", 3))
        return cls(
            family=family,
            ids=ids,
            merge_size=vision["spatial_merge_size"],
            patch_width=channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            plain_ids=vocabulary,
            pad_id=next((pad for pad in pads if isinstance(pad, int)), int(vocabulary[0])),
            tokenizer=tokenizers.Tokenizer.from_file(str(file)) if file.exists() else None,
            seed=seed,
        )

    def row(self, segments: Sequence[Text | Visual], rng: np.random.Generator) -> Row:
        """Tokens and pixels of one sample."""
        tokens, supervised, items = [], [], []
        for segment in segments:
            new = self._words(segment.text, rng) if isinstance(segment, Text) else self._placeholders(segment, rng)
            tokens += new
            supervised += [isinstance(segment, Text) and segment.answer] * len(new)
            if isinstance(segment, Visual):
                grid = (segment.t, segment.h * self.merge_size, segment.w * self.merge_size)
                patches = rng.uniform(-1, 1, (grid[0] * grid[1] * grid[2], self.patch_width)).astype(np.float32)
                items.append(Item(segment.modality, grid, patches, segment.seconds))
        return Row(np.array(tokens, np.int64), np.array(supervised, bool), tuple(items))

    def _words(self, text: str, rng: np.random.Generator) -> list[int]:
        if self.tokenizer is not None:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return rng.choice(self.plain_ids, max(1, len(text.split()))).tolist()

    def _placeholders(self, visual: Visual, rng: np.random.Generator) -> list[int]:
        image, video, start, end = self.ids
        pad, area = (image if visual.modality == "image" else video), visual.h * visual.w
        if visual.modality == "image" or self.family == "qwen2_5_vl":
            return [start, *[pad] * (visual.t * area), end]
        tokens = []
        for frame in range(visual.t):
            stamp = f"<{frame * visual.seconds + visual.seconds / 4:.1f} seconds>"
            tokens += [*self._words(stamp, rng), start, *[pad] * area, end]
        return tokens


def make_case(prompts: Prompts, name: str) -> tuple[str, list[Row]]:
    """(side of the padding, rows) of a named case; the same for the same seed."""
    side, rows = CASES[name]
    rng = np.random.default_rng([prompts.seed, list(CASES).index(name)])
    return side, [prompts.row(segments, rng) for segments in rows]


def batch(prompts: Prompts, rows: Sequence[Row], side: str) -> dict[str, np.ndarray]:
    """The arrays a transformers model takes, under its names.

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
        items = [item for row in rows for item in row.items if item.modality == modality]
        if items:
            arrays[f"{modality}_grid_thw"] = np.array([item.grid for item in items], np.int64)
            arrays[pixels] = np.concatenate([item.patches for item in items])
            if modality == "video" and prompts.family == "qwen2_5_vl":
                arrays["second_per_grid_ts"] = np.array([item.seconds for item in items], np.float32)
    return arrays


def example_row(example) -> Row:
    """The row of an encoded `Example`: its tokens, its targets, and its patches split by image and video."""
    items, first, stamps = [], 0, iter(example.timestamps)
    for grid in example.grids:
        count, seconds = grid.t * grid.h * grid.w, 1.0
        if grid.modality == "video":
            times = next(stamps)
            seconds = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
        items.append(Item(grid.modality, (grid.t, grid.h, grid.w), example.patches[first : first + count], seconds))
        first += count
    return Row(np.asarray(example.tokens, np.int64), np.asarray(example.supervised, bool), tuple(items))
