"""What both sides of gpu.py compute: a model by its sizes, random clips, and questions about them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.published import published_config
from mllm4d_jax.encode.example import Example
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import text_positions
from tools import make_checkpoint
from tools.reference import cases

ROW = "ROW "  # before a measured row on standard output
_SYSTEM = 32  # tokens before the clip
_ERROR_LINES = 3


class Scale(NamedTuple):
    """Sizes of the work.

    Attributes:
      size: of the model, a published one or "tiny"; `dtype` of weights and activations; `rank` of the adapters.
      frames, side: of a clip, the latter in pixels.
      prefix, branch, answer: tokens of a prompt with its clip, of a question with its answer, supervised ones of these.
      steps: timed training steps.
      tokens: of a completion; `their_tokens`: of one by the reference, which is slower.
      clips: the reference's rows of a step; half of them where they do not fit, and so on.
      sparse: tokens of the sparse layer's measurement.
    """

    size: str = "8b"
    dtype: str = "bfloat16"
    rank: int = 128
    frames: int = 32
    side: int = 224
    prefix: int = 1024
    branch: int = 96
    answer: int = 24
    steps: int = 3
    tokens: int = 129
    their_tokens: int = 17
    clips: int = 16
    sparse: int = 8192


TINY = Scale(
    size="tiny", dtype="float32", rank=8, frames=4, side=64, prefix=64, branch=16, answer=4, steps=1, tokens=5,
    their_tokens=3, clips=2, sparse=64,
)  # fmt: skip


def scale_of(tiny: bool, gpu: bool) -> Scale:
    """The sizes of a run; a GPU's attention kernels take 16 bits alone."""
    return (TINY._replace(dtype="bfloat16") if gpu else TINY) if tiny else Scale()


def report(case: str, side: str = "ours", **figures: Any) -> None:
    """Print a measured row for gpu.py: what was measured, on which side, and its figures by name."""
    print(ROW + json.dumps(dict(case=case, side=side) | figures), flush=True)


def guarded(case: str, measure: Callable[[], None], side: str = "ours") -> bool:
    """Run `measure`; what it raises becomes a row, so that the rest of the part goes on. Returns whether it ended."""
    try:
        measure()
    except Exception as problem:  # whatever a compiler or a library raises
        lines = [line for line in f"{type(problem).__name__}: {problem}".splitlines() if line.strip()]
        report(case, side, error=" | ".join(line[:160] for line in lines[:_ERROR_LINES]))
        return False
    return True


def seconds_of(run: Callable[[], Any], wait: Callable[[Any], Any], times: int) -> float:
    """Return the mean seconds of `times` runs in a row after one that warms up; `wait` ends what a run has begun."""
    wait(run())
    started = time.perf_counter()
    for _ in range(times):
        last = run()
    wait(last)
    return (time.perf_counter() - started) / times


def write_settings(folder: Path, size: str) -> ModelConfig:
    """Write a model folder without weights and return its sizes; "tiny" has the vocabulary of the published ones."""
    config = make_checkpoint.tiny_config() if size == "tiny" else published_config(size)
    folder.mkdir(parents=True, exist_ok=True)
    make_checkpoint.write_settings(folder, config)
    return ModelConfig.from_folder(folder)


def make_questions(folder: Path, scale: Scale, clip: int, count: int) -> list[Example]:
    """Make `count` questions about one clip: a common beginning of `prefix` tokens, then `branch` random ones each.

    Args:
      folder: of the model, see `write_settings`.
      clip: its number, from which its pixels and all tokens follow.
      count: 0 for one prompt that is the beginning alone.
    """
    config, prompts = ModelConfig.from_folder(folder), cases.PromptMaker.from_folder(folder, clip)
    rng, factor = np.random.default_rng(clip), config.vision.patch_size * config.vision.merge_size
    side = scale.side // factor
    video = cases.Pixels("video", scale.frames // config.vision.temporal_patch_size, side, side)
    row = prompts.row((cases.Text("word " * _SYSTEM), video), rng)
    if len(row.tokens) > scale.prefix:
        raise ValueError(f"a clip of {len(row.tokens)} tokens for prompts of {scale.prefix}")
    beginning = np.concatenate([row.tokens, rng.choice(prompts.plain_ids, scale.prefix - len(row.tokens))])
    (grid, patches, _), examples = row.media[0], []
    stamps = (tuple(np.arange(grid.t, dtype=float)),)
    for number in range(max(count, 1)):
        branch = rng.choice(prompts.plain_ids, scale.branch if count else 0)
        tokens = np.concatenate([beginning, branch]).astype(np.int32)
        positions, delta = text_positions(config, tokens, [grid])
        supervised = np.arange(len(tokens)) >= len(tokens) - (scale.answer if count else 0)
        key = f"clip {clip}, question {number}"
        examples.append(Example(key, tokens, positions, delta, supervised, patches, (grid,), stamps, ""))
    return examples
