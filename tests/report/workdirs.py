"""Workdirs as the tasks leave them, made in a moment: SFT, GRPO and evaluation, with clips that can be decoded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sample import write_sample_world

NASTY = "<script>alert('x')</script> & \"quoted\" </td></style> \ud800 ✓"
REWARDS = ("accuracy", "format", "camera", "object", "tags", "centers", "length", "total")
TIMES = ("data", "vision", "prefill", "decode", "score", "update")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON Lines as the runs write them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sample_clips(folder: Path, clips: int = 6) -> list[tuple[str, str, str]]:
    """(clip, question, right letter) of every question of a sample world."""
    records = json.loads(write_sample_world(folder, clips=clips).read_text(encoding="utf-8"))
    found = []
    for record in records:
        asked, answered = (turn["value"] for turn in record["conversations"])
        found.append((str(folder / record["video"]), asked.removeprefix("<video>\n"), answered))
    return found


def sft_rows(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows as `sft.step` makes them."""
    rng = np.random.default_rng(seed)
    return [
        {
            "step": n + 1,
            "loss": 2.0 * np.exp(-n / (steps / 4)) + 0.3 + 0.1 * rng.random(),
            "accuracy": 1 - 0.6 * np.exp(-n / (steps / 4)),
            "grad_norm": float(np.exp(rng.normal(0, 0.5))),
            "lr": 2e-5 * (1 - n / steps),
            "step_s": 1.5 + 0.2 * rng.random(),
            "data_wait_s": 0.02,
            "tokens": 4000,
            "padding": 0.1,
            "mfu": None,
            "memory_gib": None,
            "devices": 1,
            "position": 8 * n,
            "quarantined": n // 100,
        }
        for n in range(steps)
    ]


def write_sft(folder: Path, steps: int = 500, seed: int = 0) -> Path:
    """An SFT workdir with a config, metrics and two bad records."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "metrics.jsonl", sft_rows(steps, seed))
    config = {"task": "sft", "seed": seed, "optim": {"lr": 2e-5, "b2": 0.999}, "data": {"path": NASTY}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bad = [
        {"source": 0, "index": 3, "key": "a.json#3", "reason": "missing_file", "message": "video a.mp4 does not exist"},
        {"source": 0, "index": 9, "key": NASTY, "reason": "too_long", "message": NASTY},
    ]
    write_lines(folder / "quarantine.jsonl", bad)
    return folder


def grpo_rows(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a GRPO run: rewards that rise, a divergence that grows."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(steps):
        share = 1 - np.exp(-2 * n / steps)
        row = {"step": n + 1, "loss": float(rng.normal(0, 0.02)), "reward": 0.3 + 0.5 * share + 0.05 * rng.random()}
        row |= {f"reward/{name}": 0.2 + 0.6 * share + 0.08 * rng.random() for name in REWARDS if name != "total"}
        row |= {f"reward_std/{name}": 0.3 - 0.2 * share for name in REWARDS}
        row |= {f"time/{name}": float(0.2 + i + 0.1 * rng.random()) for i, name in enumerate(TIMES)}
        row |= {"kl": 0.02 * share, "entropy": 1.2 - 0.6 * share, "ratio": 1 + 0.001 * rng.random()}
        row |= {"clipped_low": 0.01 * rng.random(), "clipped_high": 0.02 * rng.random(), "dead_groups": int(3 * share)}
        row |= {"truncated": 1, "dropped": 0, "gap": 1e-4 * (1 + rng.random()), "gap_max": 1e-2, "importance": 1.0}
        row |= {"completion_tokens": 180 + 60 * share, "completion_tokens_max": 512, "grad_norm": 0.4, "lr": 1e-6}
        row |= {"step_s": 16.0, "staleness": 0, "rollouts_per_s": 6.0, "tokens_per_s": 900.0 + 50 * rng.random()}
        rows.append(row)
    return rows


def completion(step: int, key: str, branch: int, clip: str, question: str, right: str, rng: np.random.Generator):
    """A row of completions.jsonl; some are wrong, some have no answer."""
    truth = {"camera": [[0.0, 0.0, 0.0], [0.4, 0.0, 1.2]], "object": [[1.0, 0.2, 3.0], [1.6, 0.2, 2.4]]}
    said = {k: [[round(float(v), 2) for v in np.array(p) + rng.normal(0, 0.3, 3)] for p in v] for k, v in truth.items()}
    kind = rng.choice(["right", "wrong", "none"], p=[0.6, 0.3, 0.1])
    letter = {"right": right, "wrong": "ABCD"[("ABCD".index(right) + 1) % 4], "none": None}[str(kind)]
    camera = "; ".join(f"Camera Center: {center}" for center in said["camera"])
    objects = "; ".join(f"Object Center: {center}" for center in said["object"])
    text = (
        f"<thinking>\nIn the first frame the shape is left of the middle. {camera}.\nIn the last frame it is farther "
        f"to the right, so it moved. {objects}.\n</thinking>\n"
        + (f"<answer>{letter}</answer>" if letter else "<answer>")
    )
    rewards = {"accuracy": float(kind == "right"), "format": 0.5, "camera": 0.6, "object": float(rng.random())}
    return {
        "step": step, "key": key, "question": question, "media": [clip], "branch": branch, "completion": text,
        "finish": "stop" if letter else "length", "tokens": len(text) // 4, "rewards": rewards,
        "total": 0.5 * rewards["accuracy"] + 0.4, "advantage": float(rng.normal()), "answer": letter,
        "solution": {"answer": right, "camera_center": truth["camera"], "object_center": truth["object"]}, **said,
    }  # fmt: skip


def write_grpo(folder: Path, steps: int = 500, groups: int = 25, branches: int = 8, seed: int = 0) -> Path:
    """A GRPO workdir: metrics, held-out evaluations, and `groups` x `branches` completions spread over the steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, clips = np.random.default_rng(seed), sample_clips(folder / "world")
    write_lines(folder / "metrics.jsonl", grpo_rows(steps, seed))
    evals = []
    for step in range(50, steps + 1, 50):
        row = {"step": step, "n": 64, "reward": 0.3 + 0.5 * step / steps, "reward/accuracy": 0.6 * step / steps}
        evals.append(row | {"completion_tokens": 200})
    write_lines(folder / "evals.jsonl", evals)
    rows = []
    for group in range(groups):
        clip, question, right = clips[group % len(clips)]
        step = 1 + group * (steps - 1) // max(groups - 1, 1)
        rows += [completion(step, f"r1.jsonl#{group}", b, clip, question, right, rng) for b in range(branches)]
    write_lines(folder / "completions.jsonl", rows)
    config = {"task": "grpo", "seed": seed, "optim": {"lr": 1e-6}, "grpo": {"branches": branches, "kl": 0.04}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def predictions(clips, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl, a few without a letter and a few in conflict."""
    rng, rows = np.random.default_rng(seed), []
    for n, (clip, question, right) in enumerate(clips):
        letter = [right, right, "ABCD"["DABC".index(right)], None][int(rng.integers(4))]
        rows.append(
            {
                "id": f"q{n}", "benchmark": "vlm4d", "split": ["real", "synthetic"][n % 2],
                "category": ["exo", "ego", None][n % 3], "subtask": ["direction", "distance"][n // 2 % 2],
                "video": clip, "media": clip, "question": question,
                "choices": {c: f"option {c}" for c in "ABCD"}, "answer": f"option {right}", "truth": [right],
                "prompt_mode": "direct", "response": f"The answer is {letter}." if letter else "I cannot say.",
                "tokens": 6, "finish": "stop", "letter": letter, "rule": "phrase" if letter else "",
                "conflict": n % 7 == 0, "correct": letter == right, "config": "c0ffee",
            }
        )  # fmt: skip
    return rows


def write_eval(folder: Path, seed: int = 0, clips: int = 6) -> Path:
    """An evaluation workdir without results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "predictions.jsonl", predictions(sample_clips(folder / "world", clips), seed))
    config = {"task": "eval", "seed": seed, "model": {"path": f"weights/{seed}"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
