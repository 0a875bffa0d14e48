"""The stages of the quickstart: which task does each of them, with which settings, from which others' results."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_collections

from configs import reading, schema
from configs.tables.quickstart import SECONDS, SIZES
from mllm4d_jax.files import digests, jsonl
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
      seconds: that it takes on two quiet cores.
      late: further values, which follow from results of earlier stages.
    """

    name: str
    title: str
    spec: str
    values: Values
    inputs: tuple[str, ...]
    folder: str
    seconds: float
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
        manifest = folder / "manifest.json"  # names the others
        others = json.loads(manifest.read_bytes())["files"] if manifest.is_file() else ()
        return [manifest, *(folder / name for name in others)]


def stages(config: ml_collections.ConfigDict, workdir: str) -> list[Stage]:
    """Return all stages in their order, with the settings of `config.size` and paths below `workdir`."""
    base, prompt = own(config.base), own(PROMPT)
    at = lambda *names: "/".join((workdir, *names))  # noqa: E731
    seeded = {"seed": config.seed} if config.seed else {}
    workers = {"workers": config.workers or os.cpu_count()}
    made = {**seeded, **workers}
    world = {"data.root": at("worlds", "clips")}
    sft = {"model.path": base, "data.path": at("questions", "train.json"), **world}
    reasoning = {
        "model.path": base,
        "model.adapter": at("sft"),
        "data.path": at("reasoning", "cold_start.json"),
        **world,
    }
    grpo = {
        "model.path": base,
        "model.adapter": at("cold_start"),
        "data.path": at("questions", "train_r1.jsonl"),
        **world,
        "prompt.system_file": prompt,
    }
    listed = [
        ("worlds", "rendering worlds for two eyes", "curate.py:quickstart_worlds", made, ()),
        ("bench", "rendering other worlds, to be examined on", "curate.py:quickstart_bench", workers, ()),
        (
            "questions",
            "finding depth, camera path and objects in both views, and asking about them",
            "curate.py:quickstart",
            {**made, "input": at("worlds", "clips")},
            ("worlds",),
        ),
        ("sft", "fine-tuning on the answers", "sft.py:quickstart", {**seeded, **sft}, ("questions",)),
        (
            "reasoning",
            "writing reasoning with spatial states",
            "curate.py:quickstart_reasoning",
            {**seeded, "cold_start.records": at("questions", "train_r1.jsonl"), "cold_start.system_file": prompt},
            ("questions",),
        ),
        (
            "cold_start",
            "cold start: learning to write reasoning",
            "cold_start.py:quickstart",
            {**seeded, **reasoning},
            ("sft", "reasoning"),
        ),
        (
            "grpo_without_st",
            "reinforcement without the spatio-temporal reward",
            "grpo.py:quickstart_without_st",
            {**seeded, **grpo},
            ("questions", "cold_start"),
        ),
        (
            "grpo",
            "reinforcement with the spatio-temporal reward",
            "grpo.py:quickstart",
            {**seeded, **grpo},
            ("questions", "cold_start"),
        ),
        (
            "control",
            "control: more fine-tuning for as long as the reinforcement took",
            "cold_start.py:quickstart",
            {**seeded, **reasoning, "model.adapter": at("cold_start")},
            ("reasoning", "cold_start", "grpo"),
        ),
        *_examinations(base, prompt, at),
    ]
    changes = SIZES[config.size]
    return [
        Stage(
            name,
            title,
            f"configs/{spec}",
            {**values, **changes.get(name, {})},
            inputs,
            at(name),
            SECONDS[name],
            **({"late": lambda: equal_time(at("grpo"), at("cold_start"))} if name == "control" else {}),
        )
        for name, title, spec, values, inputs in listed
    ]


def own(path: str) -> str:
    """Return a path as it is, or below the repository where it is not there."""
    return path if os.path.exists(path) else str(reading.ROOT / path)


def _examinations(
    base: str, prompt: str, at: Callable[..., str]
) -> list[tuple[str, str, str, Values, tuple[str, ...]]]:
    """The evaluations, as `stages` lists them: what is asked, in which manner, of which model."""
    asked = {"data.path": at("bench", "bench.json"), "data.root": at("bench"), "model.path": base}
    direct, thinking = "eval.py:quickstart", "eval.py:quickstart_reasoning"
    forced, shuffled = {"prompt.gen_prefix": "<answer>"}, {"control": "shuffled"}
    of = {
        "base": ("the base model", direct, "", {}),
        "base_forced": ("the base model, made to answer", direct, "", forced),
        "sft": ("the fine-tuned model", direct, "sft", {}),
        "sft_shuffled": ("the fine-tuned model on shuffled frames", direct, "sft", shuffled),
        "cold_start": ("the model after the cold start", thinking, "cold_start", {}),
        "control": ("the control", thinking, "control", {}),
        "grpo_without_st": ("the model reinforced without the ST-reward", thinking, "grpo_without_st", {}),
        "grpo": ("the model reinforced with it", thinking, "grpo", {}),
    }
    return [
        (
            f"eval_{name}",
            f"examining {what}",
            spec,
            {
                **asked,
                **({"model.adapter": at(adapter)} if adapter else {}),
                **({"prompt.file": prompt} if spec == thinking else {}),
                **values,
            },
            ("bench", *([adapter] if adapter else [])),
        )
        for name, (what, spec, adapter, values) in of.items()
    ]


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
