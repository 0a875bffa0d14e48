"""What the stages reached: Table 3 of the paper in miniature, from the predictions and the logs of the runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.tables.quickstart import WITH_ST
from mllm4d_jax.eval import statistics
from mllm4d_jax.eval.predictions import Prediction, read_predictions
from mllm4d_jax.eval.statistics import Estimate
from mllm4d_jax.files import jsonl
from mllm4d_jax.qa.reasoning import parse
from mllm4d_jax.qa.rewards import Solution
from mllm4d_jax.quickstart.done import StageRecord, StageRecords
from mllm4d_jax.quickstart.stages import Stage
from mllm4d_jax.report.reading import METRICS

# Rows of the table, in its order: stage -> what it is called.
ROWS = {
    "eval_base": "base model",
    "eval_base_forced": "base, made to answer",
    "eval_sft": "SFT",
    "eval_sft_shuffled": "SFT, shuffled video",
    "eval_cold_start": "cold start",
    "eval_control": "equal-time SFT",
    "eval_grpo_without_st": "GRPO without ST",
    "eval_grpo": "GRPO with ST",
}
# Differences on the same questions: second less first.
COMPARED = (
    ("eval_cold_start", "eval_grpo_without_st"),
    ("eval_cold_start", "eval_grpo"),
    ("eval_grpo_without_st", "eval_grpo"),
    ("eval_control", "eval_grpo"),
)
KINDS = ("camera", "object")


@dataclasses.dataclass(frozen=True)
class Examined:
    """A model's answers to the questions that it was examined on.

    Attributes:
      answers: by the question's id.
      errors: camera or object -> question's id -> mean metres between the centres that it wrote and the true ones, of
        questions that have true ones and to which it wrote as many.
      asked: camera or object -> number of questions that have true centres.
    """

    answers: Mapping[str, Prediction]
    errors: Mapping[str, Mapping[str, float]]
    asked: Mapping[str, int]

    def clusters(self, names: Sequence[str]) -> list[str]:
        """Return the worlds of questions: those about one world are not independent."""
        return [self.answers[name].video for name in names]

    @property
    def subtasks(self) -> list[str]:
        return sorted({str(one.subtask) for one in self.answers.values()})

    def accuracy(self, subtask: str = "") -> Estimate:
        """Return the accuracy in a subtask, or the mean of all subtasks."""
        chosen = [one for one in self.answers.values() if not subtask or one.subtask == subtask]
        right, worlds = [one.correct for one in chosen], [one.video for one in chosen]
        return statistics.accuracy(right, worlds, groups=[str(one.subtask) for one in chosen])

    def error(self, kind: str) -> Estimate:
        """Return the mean error of the centres of a kind, metres."""
        of = self.errors[kind]
        return statistics.mean(list(of.values()), self.clusters(list(of)))


@dataclasses.dataclass(frozen=True)
class Results:
    """All that the table and the page show.

    Attributes:
      examined: stage -> answers.
      solutions: question's id -> its solution.
      chance: subtask -> of guessing a letter.
      rewards: stage of reinforcement -> component of the reward, and "paper" for their weighted sum -> means of the
        completions of the first and of the last tenth of the steps.
      stages: (stage, what is known of it).
    """

    examined: Mapping[str, Examined]
    solutions: Mapping[str, Solution]
    chance: Mapping[str, float]
    rewards: Mapping[str, Mapping[str, tuple[float, float]]]
    stages: Sequence[tuple[Stage, StageRecord]]


def read_results(workdir: Path, listed: Sequence[Stage], records: StageRecords) -> Results:
    """Return the results of stages that are all done. Raises PredictionError, JsonLinesError, SolutionError."""
    rows = json.loads((workdir / "bench" / "bench.json").read_bytes())
    solutions = {row["id"]: Solution.from_record(row["solution"]) for row in rows}
    folders = {stage.name: Path(stage.folder) for stage in listed}
    examined = {name: examine(read_predictions(folders[name]), solutions) for name in ROWS}
    some = next(iter(examined.values()))
    guessed = {s: [1 / len(one.choices) for one in some.answers.values() if one.subtask == s] for s in some.subtasks}
    return Results(
        examined,
        solutions,
        {subtask: float(np.mean(shares)) for subtask, shares in guessed.items()},
        {name: rewards_of(folders[name]) for name in ("grpo_without_st", "grpo")},
        [(stage, records[stage.name]) for stage in listed],
    )


def examine(predictions: Sequence[Prediction], solutions: Mapping[str, Solution]) -> Examined:
    """Return predictions with the errors of the centres that they hold."""
    errors: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    asked = dict.fromkeys(KINDS, 0)
    for one in predictions:
        read, solution = parse(one.response), solutions[one.id]
        for kind in KINDS:
            truth = [c for c in getattr(solution, f"{kind}_center") if c is not None]
            said = [c for c in getattr(read, f"{kind}_centers") if c is not None]
            asked[kind] += bool(truth)
            if truth and len(said) == len(truth):
                pairs = zip(said, truth, strict=True)
                errors[kind][one.id] = math.fsum(math.dist(a, b) for a, b in pairs) / len(truth)
    return Examined({one.id: one for one in predictions}, errors, asked)


def rewards_of(folder: Path) -> dict[str, tuple[float, float]]:
    """Return the rewards of sampled completions at the beginning and at the end of a run, see `Results`."""
    rows = jsonl.read_steps(folder / METRICS, numbers=[f"reward/{name}" for name in WITH_ST])
    tenth = max(1, len(rows) // 10)
    found = {
        name: tuple(float(np.mean([row[f"reward/{name}"] for row in part])) for part in (rows[:tenth], rows[-tenth:]))
        for name in WITH_ST
    }
    return {"paper": tuple(sum(share * found[name][n] for name, share in WITH_ST.items()) for n in (0, 1)), **found}


def accuracy_difference(first: Examined, second: Examined) -> Estimate:
    """Return the second's accuracy less the first's on the questions that both answered."""
    names = sorted(first.answers.keys() & second.answers.keys())
    right = ([one.answers[name].correct for name in names] for one in (first, second))
    return statistics.paired_difference(*right, first.clusters(names))


def error_difference(first: Examined, second: Examined, kind: str) -> Estimate:
    """Return the second's error of centres less the first's, metres, on the questions to which both wrote them."""
    names = sorted(first.errors[kind].keys() & second.errors[kind].keys())
    return statistics.mean([second.errors[kind][n] - first.errors[kind][n] for n in names], first.clusters(names))
