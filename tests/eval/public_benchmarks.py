"""Made-up questions in the forms of public benchmarks."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

VSI_KINDS = (
    "object_counting",
    "object_abs_distance",
    "object_rel_distance",
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
)
DISTANCES = ["A. sofa", "B. table", "C. lamp", "D. door"]
SIDES = ["A. left", "B. right"]


def vsi_row(n: int, kind: str, answer: str, scene: str = "scene0", **changes: Any) -> dict[str, Any]:
    """A row of nyu-visionx/VSI-Bench."""
    options = {"object_rel_distance": DISTANCES}.get(kind, SIDES if "direction" in kind else None)
    row = {"id": n, "dataset": "scannet", "scene_name": scene, "question_type": kind}
    return row | {"question": f"Question {n}?", "ground_truth": answer, "options": options} | changes


def sti_row(n: int, **changes: Any) -> dict[str, Any]:
    """A row of qa.parquet of STI-Bench."""
    candidates = {"A": "1 m", "B": "2 m", "C": "3 m", "D": "4 m", "E": "5 m"}
    row = {"Video": "000123.mp4", "ID": n, "time_start": 0, "time_end": 12.5, "Task": "Pose Estimation"}
    return row | {"Question": "How far?", "Candidates": candidates, "Answer": "B", "Source": "x"} | changes


def dsr_row(**changes: Any) -> dict[str, Any]:
    """A row of benchmark.parquet of DSR-Bench."""
    options = ["A. nearer", "B. farther", "C. both", "D. neither"]
    row = {"videoID": "abc_1.2", "type": "rel_dis", "question": "Between 1.0s and 2.0s, how does it change?"}
    return row | {"options": options, "answer": "C"} | changes


def mmsi_entry(**changes: Any) -> dict[str, Any]:
    """An entry of mmsivideo.json of MMSI-Video-Bench, about two clips and an image."""
    clips = [{"path": f"clip{n}.mp4", "start": 6.0, "end": 12.0, "base_fps": 1.0} for n in range(2)]
    entry = {"id": "question_0001", "type": "Planning", "video_list": clips, "ref_images": ["a.jpg"]}
    entry |= {
        "frames_list": [["a"], ["b"]],
        "system_prompt": "You see clips.",
        "task_prompt": "Clips: <video><video>\n",
    }
    entry |= {"user_prompt": "Where is <image>?\nA. here\nB. there\n", "format_prompt": "Answer with a letter."}
    return entry | {"ori_question": "Where is <image>?", "options": ["here", "there"], "ground_truth": "B"} | changes


def write_parquet(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "test.parquet") -> Path:
    """Writes rows as the hub does."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / name)
    return folder / name


def write_tsv(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "test.tsv") -> Path:
    """Writes rows as pandas does: lists as Python prints them, nothing for None."""
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return folder / name
