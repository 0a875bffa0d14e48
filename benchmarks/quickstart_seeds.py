"""Repeat the quickstart's reinforcement with several seeds and examine all of it on worlds that nothing was tuned on.

python run.py --config=configs/quickstart.py --workdir=runs/quickstart
python -m benchmarks.quickstart_seeds --workdir=runs/quickstart --seeds=1,2,3

Goes on from the cold start of a finished quickstart, with questions from the stereo stage about `--worlds` that
fine-tuning has not seen (of those that it has, reinforcement learns nothing that greedy answers show): reinforcement
without and with the spatio-temporal reward and the control, fine-tuning on reasoning about these questions for as long,
each with every seed and for `--steps`; then greedy answers to questions about `--clips` other worlds. A stage that is
done is passed over, so the same command goes on where it was stopped. Prints accuracies, the paper's reward of greedy
answers, errors of centres, and differences on the same questions: those of all seeds are averaged question by question,
brackets are 95 % intervals by a bootstrap over worlds, and what each seed has alone stands beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from configs import common
from configs.tables.quickstart import MACHINES
from mllm4d_jax.eval import statistics
from mllm4d_jax.eval.predictions import read_predictions
from mllm4d_jax.files.lock import WriterLock
from mllm4d_jax.qa.rewards import Solution, score
from mllm4d_jax.quickstart.done import QuickstartError, StageRecords
from mllm4d_jax.quickstart.progress import StatusLine
from mllm4d_jax.quickstart.results import KINDS, Examined, examine, rewards_of
from mllm4d_jax.quickstart.stages import Stage, equal_time, stages
from mllm4d_jax.quickstart.tables import percent
from mllm4d_jax.quickstart.task import do_stages
from mllm4d_jax.report.reading import CONFIG

RATE = 6e-4  # of reinforcement; in as few steps as the quickstart takes it harms
# Of the worlds that are examined, and of those that are learned from: not the quickstart's, nor those of pre-training.
SEED, LEARNED = 9100, 9200
ONCE = ("base", "sft", "sft_shuffled", "cold_start")
REPEATED = ("control", "grpo_without_st", "grpo")
COMPARED = (
    ("cold_start", "control"),
    ("cold_start", "grpo_without_st"),
    ("cold_start", "grpo"),
    ("control", "grpo"),
    ("grpo_without_st", "grpo"),
)
MEASURES = ("accuracy", "reward", *KINDS)


def listed(
    workdir: str, base: str, seeds: Sequence[int], worlds: int, clips: int, steps: int, workers: int
) -> list[Stage]:
    """Return all stages, below `seeds/` of a quickstart's workdir: worlds, questions, training, examinations.

    Args:
      base: folder of the model that the quickstart started from.
      worlds: to learn from. clips: of the examination. steps: of reinforcement. workers: processes that render.
    """
    config = common.config("quickstart", {"workers": workers, "base": base})
    of, top = {stage.name: stage for stage in stages(config, workdir)}, f"{workdir}/seeds"
    bench = dataclasses.replace(
        of["bench"],
        values={**of["bench"].values, "seed": SEED, "synthetic.clips": clips},
        folder=f"{top}/bench",
        title="rendering worlds that nothing was tuned on",
    )
    asked = {"data.path": f"{top}/bench/bench.json", "data.root": f"{top}/bench"}
    found = [bench, *_questions(of, top, worlds)]
    asked_about = {"data.root": f"{top}/questions_rl/forms"}
    for name in ONCE:
        stage = of[f"eval_{name}"]
        values, folder = {**stage.values, **asked}, f"{top}/{stage.name}"
        found.append(dataclasses.replace(stage, values=values, folder=folder, inputs=("bench",)))
    for seed in seeds:
        # What earlier stages of the quickstart made has files outside `seeds/`, whose digests are known by themselves.
        reinforced = {"seed": seed, "train.steps": steps, "optim.lr": RATE, **asked_about}
        reinforced["data.path"] = f"{top}/questions_rl/train_r1.jsonl"
        for name in ("grpo_without_st", "grpo"):
            found.append(_again(of[name], seed, reinforced, top, inputs=("questions_rl",)))
        late = _equal_time(f"{top}/grpo_{seed}", f"{workdir}/cold_start")
        taught = {"seed": seed, "data.path": f"{top}/reasoning_rl/cold_start.json", **asked_about}
        found.append(_again(of["control"], seed, taught, top, inputs=("reasoning_rl", f"grpo_{seed}"), late=late))
        for name in REPEATED:
            trained = f"{name}_{seed}"
            examined = {**asked, "model.adapter": f"{top}/{trained}"}
            found.append(_again(of[f"eval_{name}"], seed, examined, top, inputs=("bench", trained)))
    longer = {
        "bench": clips / of["bench"].config().synthetic.clips,
        "worlds": worlds / of["worlds_rl"].config().synthetic.clips,
        "grpo": steps / of["grpo"].config().train.steps,
    }
    longer |= {"eval": longer["bench"], "questions": longer["worlds"], "control": longer["grpo"]}
    return [
        dataclasses.replace(stage, seconds=stage.seconds * longer.get(stage.name.partition("_")[0], 1.0))
        for stage in found
    ]


def _questions(of: Mapping[str, Stage], top: str, worlds: int) -> Iterator[Stage]:
    """Yield what makes questions, and reasoning about them, of worlds that the quickstart has not seen."""
    records = f"{top}/questions_rl/train_r1.jsonl"
    for name, values, inputs in (
        ("worlds_rl", {"seed": LEARNED, "synthetic.clips": worlds}, ()),
        ("questions_rl", {"seed": LEARNED, "input": f"{top}/worlds_rl/clips"}, ("worlds_rl",)),
        ("reasoning_rl", {"seed": LEARNED, "cold_start.records": records}, ("questions_rl",)),
    ):
        stage = of[name]
        yield dataclasses.replace(stage, values={**stage.values, **values}, folder=f"{top}/{name}", inputs=inputs)


def _equal_time(reinforced: str, taught: str) -> Callable[[], Mapping]:
    return lambda: equal_time(reinforced, taught)


def _again(stage: Stage, seed: int, values: Mapping, top: str, **changed: Any) -> Stage:
    """Return a stage of another name and folder for a seed, with other values."""
    name = f"{stage.name}_{seed}"
    values = {**stage.values, **values}
    return dataclasses.replace(
        stage, name=name, title=f"{stage.title}, seed {seed}", values=values, folder=f"{top}/{name}", **changed
    )


def base_of(workdir: str) -> str:
    """Return the base model that a quickstart started from. Raises QuickstartError: its cold start is not done."""
    done = StageRecords(Path(workdir)).get("cold_start")
    if done is None or not done.results:
        raise QuickstartError(
            f"{workdir} has no finished cold start: first python run.py --config=configs/quickstart.py "
            f"--workdir={workdir}"
        )
    return json.loads(Path(workdir, "cold_start", CONFIG).read_bytes())["model"]["path"]


@dataclasses.dataclass(frozen=True)
class Worth:
    """What a model's greedy answers are worth: measure -> question's id -> value (share, reward, metres)."""

    values: Mapping[str, Mapping[str, float]]
    worlds: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path, solutions: Mapping[str, Solution]) -> Worth:
        seen: Examined = examine(read_predictions(folder), solutions)
        values = {
            "accuracy": {name: float(one.correct) for name, one in seen.answers.items()},
            "reward": {name: score(one.response, solutions[name])["total"] for name, one in seen.answers.items()},
            **seen.errors,
        }
        return cls(values, {name: one.video for name, one in seen.answers.items()})


def averaged(models: Sequence[Worth]) -> Worth:
    """Return the mean over models, question by question, of those to which all have a value."""
    values = {}
    for measure in MEASURES:
        shared = set.intersection(*(set(one.values[measure]) for one in models))
        values[measure] = {n: float(np.mean([one.values[measure][n] for one in models])) for n in sorted(shared)}
    return Worth(values, models[0].worlds)


def difference(first: Worth, second: Worth, measure: str) -> statistics.Estimate:
    """Return the second's value less the first's on the questions to which both have one."""
    names = sorted(first.values[measure].keys() & second.values[measure].keys())
    apart = [second.values[measure][n] - first.values[measure][n] for n in names]
    return statistics.mean(apart, [first.worlds[n] for n in names])


def lines(top: Path, seeds: Sequence[int]) -> Iterator[str]:
    """Yield the tables."""
    rows = json.loads((top / "bench" / "bench.json").read_bytes())
    solutions = {row["id"]: Solution.from_record(row["solution"]) for row in rows}
    each = {name: [Worth.of(top / f"eval_{name}", solutions)] for name in ONCE}
    each |= {name: [Worth.of(top / f"eval_{name}_{seed}", solutions) for seed in seeds] for name in REPEATED}
    models = {name: averaged(several) for name, several in each.items()}
    yield f"{len(rows)} questions about worlds of seed {SEED}; training seeds: {', '.join(map(str, seeds))}"
    yield f"{'model':18s}" + "".join(f"{m:>24s}" for m in ("accuracy, %", "reward x 100", "camera cm", "object cm"))
    for name, model in models.items():
        cells = []
        for measure in MEASURES:
            of = model.values[measure]
            found = statistics.mean(list(of.values()), [model.worlds[n] for n in of]) if of else None
            cells.append(f"{percent(found) if found else '-':>24s}")
        yield f"{name:18s}" + "".join(cells)
    for measure in MEASURES:
        yield f"\n{measure}: second less first, x 100; then seed by seed"
        for before, after in COMPARED:
            whole = percent(difference(models[before], models[after], measure), signed=True)
            several = zip(_for_all(each[before], seeds), each[after], strict=True)
            alone = " ".join(f"{100 * difference(a, b, measure).value:+.1f}" for a, b in several)
            yield f"  {after + ' - ' + before:34s} {whole:24s} {alone}"
    yield "\nsampled reward (the paper's shares), first and last tenth of the steps"
    for name in ("grpo_without_st", "grpo"):
        told = (rewards_of(top / f"{name}_{seed}")["paper"] for seed in seeds)
        yield f"  {name:18s} " + "  ".join(f"{first:.3f} -> {last:.3f}" for first, last in told)


def _for_all(models: Sequence[Worth], seeds: Sequence[int]) -> Sequence[Worth]:
    return models if len(models) == len(seeds) else models * len(seeds)


def main() -> None:
    """Do what is not done, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart", help="of a finished quickstart")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--worlds", type=int, default=300, help="to learn from")
    parser.add_argument("--clips", type=int, default=1400, help="300 questions of each subtask, about")
    parser.add_argument("--steps", type=int, default=300, help="of reinforcement; the quickstart takes fewer")
    parser.add_argument("--workers", type=int, default=0, help="processes that render worlds; 0 = one for every core")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    top = Path(args.workdir) / "seeds"
    found = listed(args.workdir, base_of(args.workdir), seeds, args.worlds, args.clips, args.steps, args.workers)
    (top / "logs").mkdir(parents=True, exist_ok=True)
    with WriterLock.of(top):
        if do_stages(found, StageRecords(top), StatusLine(), "seeds of reinforcement", MACHINES["laptop"], str(top)):
            print("\n".join(lines(top, seeds)))


if __name__ == "__main__":
    main()
