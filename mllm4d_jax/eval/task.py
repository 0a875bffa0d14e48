"""The `eval` task: score predictions that are there, or have a model make them first."""

from __future__ import annotations

import ml_collections

from mllm4d_jax.eval import evaluate, rescore
from mllm4d_jax.eval.evaluate import EvaluationError


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task.

    Raises:
      EvaluationError: there is nothing to score and no model to ask; and what `rescore.run` or `evaluate.run` raises.
    """
    if config.rescore.path:
        return rescore.run(config, workdir)
    if not (config.model.path or config.model.adapter):
        raise EvaluationError(
            "model.path and rescore.path are empty: name the model to ask with --config.model.path=DIR, or predictions "
            "to score with --config.rescore.path=FILE"
        )
    return evaluate.run(config, workdir)
