"""Made-up questions and predictions for the tests of evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm4d_jax.eval.predictions import Prediction
from mllm4d_jax.qa.benchmarks import BenchmarkQuestion

ELSEWHERE = "/home/somebody/data"


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "questions.json") -> Path:
    """Writes a JSON list, or JSONL if the name says so."""
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def vlm4d_rows() -> list[dict]:
    """Eight questions laid out like VLM4D's with responses: 4 of 6 real right, 1 of 2 synthetic; one blank response."""

    def row(name, video, choices, answer, response):
        options = dict(zip("ABCD", choices, strict=True))
        asked = {"id": f"validation_{name}", "video": video, "question_type": "multiple-choice"}
        return asked | {"question": f"Question {name}?", "choices": options, "answer": answer, "response": response}

    moves = ("left", "right", "up", "not moving")
    twins = ("not sure", "up", "away", "away")
    return [
        row(1, "videos_real/davis/bus.mp4", moves, "left", "A"),
        row(2, f"{ELSEWHERE}/videos_real/davis/bus.mp4", moves, "right", "A"),
        row(3, "videos_real/davis/dog.mp4", (1, 2, 3, 0), 1, "A"),
        row(633, "videos_real/davis/cat.mp4", twins, "away", "D"),
        row(922, "videos_real/youtube-vos/a.mp4", ("By rolling it. ", "x", "y", "z"), "By rolling it. ", ""),
        row(923, "C:\\data\\videos_real\\ego4d\\clip.mp4", moves, "up", "C"),
        row(1, "videos_synthetic/synth_1.mp4", moves, "up", "C"),
        row(2, "videos_synthetic/synth_1.mp4", ("no dragon there", "left", "right", "up"), "no dragon there", "B"),
    ]


def item(name: str = "q1", **changes) -> BenchmarkQuestion:
    """A question."""
    made = BenchmarkQuestion(
        id=name,
        benchmark="jsonl",
        split="test",
        category=None,
        subtask=None,
        video="a.mp4",
        media=None,
        question="Where does it go?",
        choices={"A": "left", "B": "right", "C": "up", "D": "down"},
        answer="A",
        truth=("A",),
    )
    return dataclasses.replace(made, **changes)


def prediction(
    name: str = "q1", response: str = "A", *, config: str = "c0", control: str = "", **changes
) -> Prediction:
    """An answered question; `changes` are those of the question, `finish` besides."""
    finish = changes.pop("finish", "stop")
    asked = item(name, **changes)
    return Prediction.of(asked, response, prompt_mode="direct", config=config, control=control, tokens=1, finish=finish)
