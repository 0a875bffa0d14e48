"""The tasks and their config keys. The tables themselves, with every default and its meaning, are in `configs/tables`.

A task's table is the whole schema: `run.py` refuses any key that is not in it. The builders return the full locked
ConfigDict; a config file starts from one of them and changes what it needs.
"""

from __future__ import annotations

from types import MappingProxyType

import ml_collections

from configs.schema import ConfigError, Key, build, did_you_mean
from configs.tables.answering import INFER_KEYS, VERIFY_KEYS
from configs.tables.curation import CURATE_KEYS
from configs.tables.evaluation import EVAL_KEYS
from configs.tables.export import EXPORT_KEYS
from configs.tables.reinforcement import GRPO_KEYS
from configs.tables.report import REPORT_KEYS
from configs.tables.training import SFT_KEYS

# task -> (its keys, the module whose run(config, workdir) does it, one line for --help)
TASKS = MappingProxyType(
    {
        "sft": (SFT_KEYS, "mllm4d_jax.sft.task", "supervised fine-tuning with LoRA on video question-answer records"),
        "grpo": (
            GRPO_KEYS,
            "mllm4d_jax.grpo.task",
            "reinforcement learning (GRPO) on video prompts with computed rewards",
        ),
        "curate": (
            CURATE_KEYS,
            "data_prep.curate",
            "make training and held-out questions from clips with known geometry",
        ),
        "infer": (INFER_KEYS, "mllm4d_jax.eval.infer", "answer a question about one video or image"),
        "verify": (VERIFY_KEYS, "mllm4d_jax.verify.task", "compare a checkpoint's numbers with a recorded reference"),
        "eval": (EVAL_KEYS, "mllm4d_jax.eval.task", "score a model, or predictions that are there, on a benchmark"),
        "export": (EXPORT_KEYS, "mllm4d_jax.export.task", "write what was trained as a PEFT adapter or a merged model"),
        "report": (REPORT_KEYS, "mllm4d_jax.report.build", "make the page of a run, or of two runs side by side"),
    }
)


def task_keys(task: object) -> tuple[Key, ...]:
    """The key table of a task. Raises ConfigError naming the nearest task for a name that is none."""
    if task not in TASKS:
        hint = did_you_mean(task, TASKS) if isinstance(task, str) else ""
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, not {task!r}{hint}")
    return TASKS[task][0]


def sft() -> ml_collections.ConfigDict:
    """Defaults of supervised fine-tuning: the paper's Qwen3-VL-8B run."""
    return build(SFT_KEYS)


def grpo() -> ml_collections.ConfigDict:
    """Defaults of reinforcement learning: the paper's run."""
    return build(GRPO_KEYS)


def infer() -> ml_collections.ConfigDict:
    """Defaults of answering one question."""
    return build(INFER_KEYS)


def verify() -> ml_collections.ConfigDict:
    """Defaults of the comparison with a recorded reference (always float32)."""
    return build(VERIFY_KEYS)


def curate() -> ml_collections.ConfigDict:
    """Defaults of making questions from clips."""
    return build(CURATE_KEYS)


def report() -> ml_collections.ConfigDict:
    """Defaults of the page of a run."""
    return build(REPORT_KEYS)


def export() -> ml_collections.ConfigDict:
    """Defaults of writing what was trained for other programs."""
    return build(EXPORT_KEYS)


def eval() -> ml_collections.ConfigDict:
    """Defaults of scoring a model on a benchmark."""
    return build(EVAL_KEYS)
