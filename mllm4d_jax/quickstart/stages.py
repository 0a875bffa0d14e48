"""The stages of the quickstart: which task does each of them, with which settings, from which others' results."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_collections

from configs import reading, schema
from configs.tables.quickstart import NEW_SEED, SECONDS, SIZES, TOGETHER, WIDER
from mllm4d_jax.files import digests, jsonl
from mllm4d_jax.models.tensor_files import SINGLE
from mllm4d_jax.report.reading import METRICS, PREDICTIONS, RESULTS

PROMPT = "mllm4d_jax/quickstart/prompt.txt"  # that asks for reasoning
WIDTH = 100  # columns of what is printed

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A task with its settings.

    Attributes:
      name: of its folder below the workdir.
      title: what it does, for people.
      spec: config file and variant.
      values: what the command line changes of that config, by dotted key.
      inputs: names of the stages whose results it reads.
      folder: its workdir.
      seconds: that it takes on the machine of its size (`configs/tables/quickstart.py`, MACHINES), beside its group.
      group: stages of one group, which follow each other, are done at the same time; '' by itself.
      late: further values, which follow from results of earlier stages.
    """

    name: str
    title: str
    spec: str
    values: Values
    inputs: tuple[str, ...]
    folder: str
    seconds: float
    group: str = ""
    late: Callable[[], Values] = lambda: MappingProxyType({})

    def flags(self) -> list[str]:
        """Return the arguments of run.py that do this stage and nothing else. `late` must be known by then."""
        values = {**self.values, **self.late()}
        changed = [f"--config.{name}={value}" for name, value in values.items()]
        return [f"--config={self.spec}", *changed, f"--workdir={self.folder}"]

    def command(self) -> str:
        """Return the command line for people, wrapped for a terminal of `WIDTH` columns where arguments allow it."""
        lines = ["python run.py"]
        for word in map(shlex.quote, self.flags()):
            if len(lines[-1]) + 1 + len(word) <= WIDTH - 4:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return " \\\n  ".join(lines)

    def config(self) -> ml_collections.ConfigDict:
        """Return the resolved config, as run.py makes it of `flags`. Raises ConfigError."""
        loaded = reading.load_config(self.spec)
        values = {**dict(schema.flatten(loaded.config)), **self.values, **self.late()}
        return schema.complete(values, loaded.keys.values())

    def artefacts(self, config: ml_collections.ConfigDict) -> list[Path]:
        """Return files that are there, whole, once the stage is done, and that change with its results."""
        folder = Path(self.folder)
        if "train" in config:
            return [folder / "checkpoints" / str(config.train.steps) / digests.LIST]
        if config.task == "eval":
            return [folder / PREDICTIONS, folder / RESULTS]
        if config.task == "export":
            return [Path(config.output, name) for name in ("config.json", SINGLE)]
        manifest = folder / "manifest.json"  # names the others
        others = json.loads(manifest.read_bytes())["files"] if manifest.is_file() else ()
        return [manifest, *(folder / name for name in others)]


def stages(config: ml_collections.ConfigDict, workdir: str) -> list[Stage]:
    """Return all stages in their order, with the settings of `config.size` and paths below `workdir`.

    Stages of a group follow each other, from where the first of them would stand.
    """
    listing = _Listing(config, workdir)
    listed = [*listing.preparation(), *listing.training(), *listing.examinations()]
    return [stage for group in in_groups(listed) for stage in group]


def in_groups(listed: Iterable[Stage]) -> list[list[Stage]]:
    """Return stages by their group, groups in the order of their first stages; one without a group is one by itself."""
    groups: dict[str, list[Stage]] = {}
    for stage in listed:
        groups.setdefault(stage.group or stage.name, []).append(stage)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class _Listing:
    """Lists the stages: here are the paths by which they are joined; other settings are variants of the configs."""

    config: ml_collections.ConfigDict
    workdir: str

    def at(self, *names: str) -> str:
        return "/".join((self.workdir, *names))

    @property
    def seeded(self) -> Values:
        return {"seed": self.config.seed} if self.config.seed else {}

    @property
    def workers(self) -> Values:
        return {"workers": self.config.workers or os.cpu_count()}

    @property
    def factor(self) -> int | None:
        """How many times as wide as `base` the model is that is trained; None for `base` itself."""
        return WIDER.get(self.config.size)

    @property
    def wider(self) -> tuple[str, ...]:
        return ("wider",) if self.factor else ()

    @property
    def base(self) -> str:
        return self.at("wider", "model") if self.factor else own(self.config.base)

    def stage(self, name: str, title: str, spec: str, values: Values, *inputs: str, **late: Callable) -> Stage:
        changed = {**values, **SIZES[self.config.size].get(name, {})}
        seconds = SECONDS[self.config.size][name]
        group = next((names[0] for names in TOGETHER.get(self.config.size, ()) if name in names), "")
        return Stage(name, title, f"configs/{spec}", changed, inputs, self.at(name), seconds, group, **late)

    def preparation(self) -> Iterator[Stage]:
        """Worlds, the questions about them, the model that is to learn, and what it will be examined on."""
        found = "finding depth, camera path and objects in both views, and asking about them"
        yield from self.worlds("", self.seeded, "rendering worlds for two eyes", found)
        # Reinforcement teaches something in worlds that fine-tuning has not seen (benchmarks/RESULTS.md).
        seeded = {"seed": self.config.seed + NEW_SEED}
        yield from self.worlds(
            "_rl", seeded, "rendering others, for reinforcement", "finding and asking the same there"
        )
        if self.factor:
            title, spec = "making a wider copy of the base model", "export.py:wider"
            copied = {"model.path": own(self.config.base), "output": self.base, "factor": self.factor}
            yield self.stage("wider", title, spec, {**self.seeded, **copied})
        yield self.stage(
            "bench", "rendering other worlds, to be examined on", "curate.py:quickstart_bench", self.workers
        )

    def worlds(self, of: str, seeded: Values, *titles: str) -> Iterator[Stage]:
        """Worlds, and the questions about them."""
        made = {**seeded, **self.workers}
        yield self.stage(f"worlds{of}", titles[0], "curate.py:quickstart_worlds", made)
        seen = {**made, "input": self.at(f"worlds{of}", "clips")}
        yield self.stage(f"questions{of}", titles[1], "curate.py:quickstart", seen, f"worlds{of}")

    def training(self) -> Iterator[Stage]:
        """Fine-tuning, cold start with its reasoning, reinforcement and its control."""
        at, prompt = self.at, own(PROMPT)
        shared = {**self.seeded, "model.path": self.base}
        clips = {"data.root": at("questions", "forms")}
        answers = {**shared, "data.path": at("questions", "train.json"), **clips}
        yield self.stage("sft", "fine-tuning on the answers", "sft.py:quickstart", answers, "questions", *self.wider)
        for of, title in (("", "writing reasoning with spatial states"), ("_rl", "the same, for the control")):
            released = {"cold_start.records": at(f"questions{of}", "train_r1.jsonl")}
            written = {**self.seeded, **released, "cold_start.system_file": prompt}
            yield self.stage(f"reasoning{of}", title, "curate.py:quickstart_reasoning", written, f"questions{of}")
        taught = {**shared, "model.adapter": at("sft"), "data.path": at("reasoning", "cold_start.json"), **clips}
        title, spec = "cold start: learning to write reasoning", "cold_start.py:quickstart"
        yield self.stage("cold_start", title, spec, taught, "sft", "reasoning")
        began = {**shared, "model.adapter": at("cold_start"), "data.root": at("questions_rl", "forms")}
        reinforced = {**began, "data.path": at("questions_rl", "train_r1.jsonl"), "prompt.system_file": prompt}
        for name, spec, title in (
            ("grpo_without_st", "grpo.py:quickstart_without_st", "without the spatio-temporal reward"),
            ("grpo", "grpo.py:quickstart", "with the spatio-temporal reward"),
        ):
            yield self.stage(name, f"reinforcement {title}", spec, reinforced, "questions_rl", "cold_start")
        title = "control: fine-tuning on the same questions for as long as that took"
        again, needed = {**began, "data.path": at("reasoning_rl", "cold_start.json")}, ("cold_start", "grpo")
        late = {"late": lambda: equal_time(at("grpo"), at("cold_start"))}
        yield self.stage("control", title, "cold_start.py:quickstart", again, "reasoning_rl", *needed, **late)

    def examinations(self) -> Iterator[Stage]:
        """Greedy answers to the questions about the other worlds, of every model."""
        asked = {"data.path": self.at("bench", "bench.json"), "data.root": self.at("bench")}
        asked |= {"model.path": self.base}
        direct, thinking = "eval.py:quickstart", "eval.py:quickstart_reasoning"
        prompted = {"prompt.file": own(PROMPT)}
        for name, adapter, spec, how, title in (
            ("base", "", direct, {}, "the base model"),
            ("base_forced", "", direct, {"prompt.gen_prefix": "<answer>"}, "the base model, made to answer"),
            ("sft", "sft", direct, {}, "the fine-tuned model"),
            ("sft_shuffled", "sft", direct, {"control": "shuffled"}, "the fine-tuned model on shuffled frames"),
            ("cold_start", "cold_start", thinking, prompted, "the model after the cold start"),
            ("control", "control", thinking, prompted, "the control"),
            ("grpo_without_st", "grpo_without_st", thinking, prompted, "what was reinforced without the ST-reward"),
            ("grpo", "grpo", thinking, prompted, "what was reinforced with the ST-reward"),
        ):
            trained = {"model.adapter": self.at(adapter)} if adapter else {}
            inputs = ("bench", adapter) if adapter else ("bench", *self.wider)
            yield self.stage(f"eval_{name}", f"examining {title}", spec, {**asked, **trained, **how}, *inputs)


def own(path: str) -> str:
    """Return a path as it is, or below the repository where it is not there."""
    return path if os.path.exists(path) else str(reading.ROOT / path)


def equal_time(reinforced: str, taught: str) -> Values:
    """Return the steps of fine-tuning that take as long as a run of reinforcement learning took.

    Args:
      reinforced: workdir of that run, which has ended.
      taught: workdir of a run with the steps that are to be taken, which says how long one takes.
    """
    total, other = (
        [row["step_s"] for row in jsonl.read_steps(Path(folder) / METRICS, numbers=("step_s",))]
        for folder in (reinforced, taught)
    )
    return {"train.steps": max(1, round(sum(total) / (sum(other) / len(other))))}
