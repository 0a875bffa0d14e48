"""The tasks. What their keys mean is in `configs/tables`; a key that is not in a task's table is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections

from configs.schema import ConfigError, Key, complete, did_you_mean
from configs.tables.curation import CURATE_KEYS
from configs.tables.quickstart import QUICKSTART_KEYS
from configs.tables.reinforcement import GRPO_KEYS
from configs.tables.training import SFT_KEYS
from configs.tables.use import EVAL_KEYS, EXPORT_KEYS, INFER_KEYS, REPORT_KEYS, VERIFY_KEYS


class Task(NamedTuple):
    """One thing that `run.py` can do: its config keys, the module whose run(config, workdir) does it, a line of help.

    Attributes:
      plan: module whose run(config, workdir, targets) does --plan; '' = there are no plans for it.
      page: whether its workdir gets a page at the end.
    """

    keys: tuple[Key, ...]
    module: str
    help: str
    plan: str = ""
    page: bool = False


TASKS = MappingProxyType(
    {
        "quickstart": Task(QUICKSTART_KEYS, "mllm4d_jax.quickstart.task", "the paper in miniature, all stages"),
        "sft": Task(SFT_KEYS, "mllm4d_jax.sft.task", "supervised fine-tuning", "mllm4d_jax.plan.task", page=True),
        "grpo": Task(
            GRPO_KEYS, "mllm4d_jax.grpo.task", "reinforcement learning (GRPO)", "mllm4d_jax.plan.task", page=True
        ),
        "curate": Task(CURATE_KEYS, "data_prep.curate", "make questions from clips with known geometry"),
        "infer": Task(INFER_KEYS, "mllm4d_jax.eval.infer", "answer questions about one video or image"),
        "verify": Task(VERIFY_KEYS, "mllm4d_jax.verify.task", "compare a checkpoint with a recorded reference"),
        "eval": Task(EVAL_KEYS, "mllm4d_jax.eval.evaluate", "score a model or predictions on a benchmark", page=True),
        "export": Task(EXPORT_KEYS, "mllm4d_jax.export.task", "write what was trained for PEFT or as a merged model"),
        "report": Task(REPORT_KEYS, "mllm4d_jax.report.build", "make the page of a run, or of two runs side by side"),
    }
)


# The module whose write_sample_world(folder, seed) writes the world of data.sample. By name, as the tasks: what trains
# knows no program that makes data.
SAMPLE_WORLD = "data_prep.sample"


def task_keys(task: object) -> tuple[Key, ...]:
    """Return the key table of a task. Raises ConfigError naming the nearest task for a name that is none."""
    if task not in TASKS:
        hint = did_you_mean(task, TASKS) if isinstance(task, str) else ""
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, not {task!r}{hint}")
    return TASKS[task].keys


def config(task: str, values: Mapping[str, Any] = MappingProxyType({})) -> ml_collections.ConfigDict:
    """Return the defaults of a task as a full locked config, `values` (by dotted key) laid over them."""
    return complete(values, task_keys(task))
