"""What a reader without the video gets right on a generated benchmark: 1,000 questions per subtask, six subtasks.

    python benchmarks/blind_bench.py [--clips=6000] [--seed=0]

Scenes of random motion without pictures; questions, balance and guessers are those of curation. Each guesser learns on
half of the source videos and is scored on the other half, both ways round.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from data_prep.questions.balance import PRESETS, select
from data_prep.questions.blind import baselines, letter_test
from data_prep.questions.propose import QuestionRules, propose
from tests.data_prep.scenes.random_scenes import random_scene


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rules, seed = QuestionRules(), arguments.seed
    scenes = (random_scene(10**6 * seed + n, points=16) for n in tqdm(range(arguments.clips), unit="clip"))
    rows = [question.record("clip.mp4") for scene in scenes for question in propose(scene, rules, seed)]
    picked = select(rows, PRESETS["bench"], seed=seed, bench_share=1.0)
    bench = [rows[n] for n in picked]
    print(f"{len(bench)} questions of {len({row['source_id'] for row in bench})} source videos")
    names = None
    for subtask, found in baselines(bench, seed).items():
        guessers = {name: value for name, value in found.items() if name not in ("chance", "count")}
        names = names or print("subtask" + " " * 27 + "questions  chance  best guess") or list(guessers)
        best = max(guessers, key=guessers.get)
        print(f"{subtask:34s}{found['count']:9.0f}{found['chance']:8.3f}{guessers[best]:8.3f}  {best}")
    for options in (3, 4):
        statistic, p = letter_test(bench, options)
        print(f"letters of questions with {options} options: chi-square {statistic:.2f}, p = {p:.3f}")


if __name__ == "__main__":
    main()
