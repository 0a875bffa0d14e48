"""What both sides of grpo_vs_hf.py begin with, and what ours hands to theirs, which may be another process."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import ml_collections
import numpy as np

from benchmarks.small_model import ModelSize, write_model
from benchmarks.small_world import ask, write_clip
from configs import common
from configs.published import published_config
from mllm4d_jax.qa.system_prompt import ST_COT
from tools import make_checkpoint

RATE, SEED = 1e-3, 0
PHASES = ("vision", "prefill", "decode", "score", "reference", "update")
SMALL = "small"  # the size that has no name among the published ones
LOOKS = ("at the start", "after a step")  # when the sides compare their numbers
_BUCKET = 64  # prompts are padded to the next multiple


def noise(completion: str, solution: Any, record: Any) -> float:
    """A number in [0, 1] made from the text: a random model says nothing to reward, and equal rewards teach nothing."""
    return zlib.crc32(completion.encode()) / (2**32 - 1)


class TimedUpdate(NamedTuple):
    """One step: seconds of each of PHASES and of the whole, and processor seconds."""

    phases: dict[str, float]
    whole: float
    cpu: float


class Numbers(NamedTuple):
    """What a side makes of the same completions: log-probs f32[C, T] of policy and reference, loss, gradient norm."""

    policy: np.ndarray
    reference: np.ndarray
    loss: float
    norm: float


class Sample(NamedTuple):
    """Completions of ours that both sides look at.

    Attributes:
      keys: of the records of the prompts.
      tokens, logprobs: i32 and f32[C, T], C completions prompt by prompt; logprobs are the sampler's.
      rewards: f32[C].
    """

    keys: tuple[str, ...]
    tokens: np.ndarray
    logprobs: np.ndarray
    rewards: np.ndarray


class Handed(NamedTuple):
    """What theirs is given.

    Attributes:
      sample: the completions.
      looks: for each of LOOKS our adapter, by "projection/lora_a" with layers first, and our numbers with it.
      rounds: keys of the prompts of each timed step.
    """

    sample: Sample
    looks: tuple[tuple[Mapping[str, np.ndarray], Numbers], ...]
    rounds: tuple[tuple[str, ...], ...] = ()

    def save(self, path: Path) -> None:
        """Write it as .npz."""
        arrays = {f"sample.{name}": np.asarray(value) for name, value in self.sample._asdict().items()}
        for n, (adapter, numbers) in enumerate(self.looks):
            arrays |= {f"{n}.adapter.{name}": value for name, value in adapter.items()}
            arrays |= {f"{n}.{name}": np.asarray(value) for name, value in numbers._asdict().items()}
        np.savez(path, rounds=np.array(self.rounds, str), **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path) as file:
            arrays = dict(file)
        sample = Sample(**{name: arrays[f"sample.{name}"] for name in Sample._fields})
        looks = []
        for n in range(len(LOOKS)):
            begin = f"{n}.adapter."
            adapter = {name.removeprefix(begin): x for name, x in arrays.items() if name.startswith(begin)}
            found = {name: arrays[f"{n}.{name}"] for name in Numbers._fields}
            looks.append((adapter, Numbers(**found | {name: float(found[name]) for name in ("loss", "norm")})))
        rounds = tuple(tuple(keys) for keys in arrays["rounds"].tolist())
        return cls(sample._replace(keys=tuple(sample.keys.tolist())), tuple(looks), rounds)


def save_steps(path: Path, steps: Sequence[TimedUpdate]) -> None:
    """Write timed steps as JSON."""
    path.write_text(json.dumps([step._asdict() for step in steps]), encoding="utf-8")


def load_steps(path: Path) -> list[TimedUpdate]:
    return [TimedUpdate(**step) for step in json.loads(path.read_text(encoding="utf-8"))]


def write_world(folder: Path, clips: int) -> Path:
    """Writes clips of STORED size and prompts.jsonl, one question about each; returns its path."""
    rng = np.random.default_rng(SEED)
    (folder / "videos").mkdir(parents=True)
    lines = []
    for n in range(clips):
        name = f"videos/clip_{n:03d}.mp4"
        write_clip(folder / name, n)
        (asked,) = ask(1, rng)
        turns = [{"role": "user", "content": f"<video>\n{asked.text}"}]
        centers = {"camera_center": [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], "object_center": []}
        lines.append(
            json.dumps({"messages": turns, "videos": [name], "solution": [{"answer": asked.letter, **centers}]}) + "\n"
        )
    path = folder / "prompts.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_weights(folder: Path, size: str, shape: ModelSize, records: Path) -> None:
    """Writes a random model: of this shape for SMALL, else a published one, or `tiny` with the vocabulary of those."""
    if size == SMALL:
        write_model(folder, shape, [records.read_text(encoding="utf-8"), ST_COT])
    else:
        config = make_checkpoint.tiny_config() if size == "tiny" else published_config(size)
        make_checkpoint.write_checkpoint(folder, config, SEED)


def run_config(
    model: Path, records: Path, *, prompts: int, completions: int, tokens: int, frames: int, side: int, dtype: str
) -> ml_collections.ConfigDict:
    """The GRPO config both sides follow: the paper's objective and prompt, frozen tower, LoRA on q, k, v, o."""
    config = common.config("grpo")
    config.model.path, config.model.adapter, config.model.dtype = str(model), "", dtype
    config.model.remat = "none"
    config.data.path, config.data.root = str(records), str(records.parent)
    config.data.prefix_buckets = tuple(range(_BUCKET, config.data.max_tokens + 1, _BUCKET))
    config.video.num_frames, config.video.min_pixels, config.video.max_pixels = frames, side**2, side**2
    config.lora.rank, config.lora.alpha = 16, 32.0
    config.optim.lr, config.optim.warmup_ratio, config.optim.schedule = RATE, 0.0, "constant"
    config.rollout.prompts, config.rollout.completions = prompts, completions
    config.rollout.max_new_tokens, config.rollout.buckets = tokens, (tokens,)
    config.reward.functions = ("paper::1.0", f"{noise.__module__}:{noise.__name__}::1.0")
    config.objective.gap_bound = 10.0  # the comparison learns twice from the same completions, uncorrected
    return config
