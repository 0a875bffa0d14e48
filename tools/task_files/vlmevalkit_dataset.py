"""A data set of VLMEvalKit: questions with one right option, scored by the strict rules. See tools/eval_tasks.py."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import vlmeval.dataset
from PIL import Image
from vlmeval.dataset.video_base import VideoBaseDataset
from vlmeval.dataset.video_dataset_config import supported_video_datasets
from vlmeval.smp import dump, load
from vlmeval.smp.file import get_intermediate_file_path

from mllm4d_jax.qa.answers import extract_answer

HERE = Path(__file__).resolve().parent
FRAMES = 32  # of a data set whose name ends with "_32frame"


class StrictVideoMCQ(VideoBaseDataset):
    """The questions of a table beside this file."""

    TYPE = "MCQ"
    DEFAULT_JUDGE = "exact_matching"

    @classmethod
    def supported_datasets(cls) -> list[str]:
        """Return the names of the tables beside this file."""
        return sorted(path.stem for path in HERE.glob("*.tsv"))

    def prepare_dataset(self, dataset: str) -> dict[str, str]:
        """Return where the questions are; their videos are named from the root of the disk."""
        return {"root": os.sep, "data_file": str(HERE / f"{dataset}.tsv")}

    def build_prompt(self, line: int | Mapping[str, Any], video_llm: bool) -> list[dict[str, str]]:
        """Return the parts of a question: its video, whole or as frames, and its text."""
        line = self.data.iloc[line] if isinstance(line, int) else line
        video = str(line["video"])
        whole = [{"type": "video", "value": video}]
        shown = whole if video_llm else [{"type": "image", "value": path} for path in self.frames(video)]
        parts = []
        for message in json.loads(line["messages"]):
            for part in message["content"]:
                parts += shown if part["type"] == "video" else [{"type": "text", "value": part["text"]}]
        return parts

    def frames(self, video: str) -> list[str]:
        """Return the files of evenly spaced frames of a video, written where they are not there yet."""
        import decord

        name = video.strip(os.sep).replace(os.sep, "_")
        clip = decord.VideoReader(video)
        count = self.nframe if self.nframe > 0 else max(1, int(len(clip) / clip.get_avg_fps() * self.fps))
        paths = self.frame_paths(name) if self.nframe > 0 else self.frame_paths_fps(name, count)
        for path, n in zip(paths, np.linspace(0, len(clip) - 1, count).round().astype(int), strict=True):
            if not os.path.exists(path):
                Image.fromarray(clip[int(n)].asnumpy()).save(path)
        return paths

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        """Return percentages: right of all and of each split, unparsed, and the mean over the subtasks if that counts.

        What cannot be read is wrong; no judge is asked.
        """
        answers = pd.DataFrame(load(eval_file))  # of a table, or of a list from JSON
        pairs = zip(answers["index"], answers["prediction"], strict=True)
        given = {str(n): "" if pd.isna(text) else str(text) for n, text in pairs}
        rows = []
        for asked in self.data.to_dict("records"):
            found = extract_answer(given.get(str(asked["index"]), ""), json.loads(asked["choices"]))
            rows.append({**asked, "letter": found.letter, "right": found.letter in json.loads(asked["truth"])})
        scored = pd.DataFrame(rows)
        shares = {"Overall": scored["right"].mean(), "unparsed": scored["letter"].isna().mean()}
        shares |= scored.groupby("split")["right"].mean().to_dict() if scored["split"].nunique() > 1 else {}
        if scored["macro"].all():
            shares["mean_over_subtasks"] = scored.groupby("subtask")["right"].mean().mean()
        found = {name: 100 * float(share) for name, share in shares.items()}
        dump(scored, get_intermediate_file_path(eval_file, "_strict"))
        dump(found, get_intermediate_file_path(eval_file, "_strict_acc", "json"))
        return found


def register() -> None:
    """Make the data sets known to the VLMEvalKit of this process."""
    vlmeval.dataset.StrictVideoMCQ = StrictVideoMCQ
    vlmeval.dataset.DATASET_CLASSES.append(StrictVideoMCQ)
    for name in StrictVideoMCQ.supported_datasets():
        vlmeval.dataset.SUPPORTED_DATASETS.append(name)
        supported_video_datasets[f"{name}_{FRAMES}frame"] = partial(StrictVideoMCQ, dataset=name, nframe=FRAMES)
        supported_video_datasets[name] = partial(StrictVideoMCQ, dataset=name)
