"""What a reader without the video gets right on generated questions: a benchmark, and training sets of skewed sources.

    python benchmarks/blind_bench.py [--clips=6000] [--seed=0] [--skewed=600]

Scenes of random motion without pictures; questions, balance and guessers are those of curation. Each guesser learns on
half of the source videos and is scored on the other half, both ways round. The benchmark has 1,000 questions of each of
six subtasks. For the training sets, all but one in 40 questions whose answer is not the first label of its scenario
(for the camera's direction: "forward") are taken away first, so that about nine in ten have the same answer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from configs import common
from data_prep.curate import choose
from data_prep.questions.balance import PRESETS, fraction, select
from data_prep.questions.blind import NO_GUESSER, baselines, letter_test
from data_prep.questions.propose import QuestionRow, QuestionRules, propose
from data_prep.questions.tally import guess, table, tally
from data_prep.scenes.relations import LABELS
from tests.data_prep.scenes.random_scenes import random_scene

RARE = 1 / 40


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skewed", type=int, default=600, help="clips of the skewed source, more than the others")
    arguments = parser.parse_args()
    rules, seed = QuestionRules(), arguments.seed

    def asked(first: int, count: int) -> list[QuestionRow]:
        scenes = (random_scene(10**6 * seed + first + n, points=16) for n in tqdm(range(count), unit="clip"))
        return [question.record("clip.mp4") for scene in scenes for question in propose(scene, rules, seed)]

    rows = asked(0, arguments.clips)
    picked = select(rows, PRESETS["bench"], seed=seed, bench_share=1.0)
    bench = [rows[n] for n in picked]
    print(f"{len(bench)} questions of {len({row['source_id'] for row in bench})} source videos")
    print("subtask" + " " * 27 + "questions  chance  best guess")
    for subtask, found in baselines(bench, seed).items():
        guessers = {name: value for name, value in found.items() if name not in NO_GUESSER}
        best = max(guessers, key=guessers.get)
        print(f"{subtask:34s}{found['count']:9.0f}{found['chance']:8.3f}{guessers[best]:8.3f}  {best}")
    for options in (3, 4):
        statistic, p = letter_test(bench, options)
        print(f"letters of questions with {options} options: chi-square {statistic:.2f}, p = {p:.3f}")
    skewed = [row | {"split": "train"} for row in asked(arguments.clips, arguments.skewed) if _usual(row, seed)]
    config = common.config("curate", {"seed": seed, "bench_share": 0.0})
    print("training set of a skewed source")
    chosen = choose(config, skewed, rules.weights)
    print(table(tally(skewed, guess(skewed, chosen, seed))))


def _usual(row: QuestionRow, seed: int) -> bool:
    labels = LABELS[row["question_type"]]
    usual = "forward" if "forward" in labels else "".join(labels[:1])
    return row["label"] == usual or fraction(seed, "rare", row["id"]) < RARE


if __name__ == "__main__":
    main()
