"""The `eval` task: score predictions that are there, or have a model make them first."""

from __future__ import annotations

import ml_collections

from mllm4d_jax.eval import rescore


class EvaluationError(ValueError):
    """The evaluation cannot be run as configured."""


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task.

    Raises:
      EvaluationError: there is nothing to score; and what `rescore.run` raises.
    """
    if config.rescore.path:
        return rescore.run(config, workdir)
    raise EvaluationError(
        "rescore.path is empty: name the predictions to score with --config.rescore.path=FILE. Asking a model the "
        "questions of a benchmark (model.path, data.path) is not built yet"
    )
