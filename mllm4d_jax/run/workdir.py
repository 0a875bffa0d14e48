"""The folder of a run, and what is said on the terminal once per run."""

from __future__ import annotations

from pathlib import Path

from mllm4d_jax.parallel import multihost
from mllm4d_jax.run import preflight


def say(text: str) -> None:
    """Prints, once per run."""
    if multihost.is_primary():
        print(text, flush=True)


def open_workdir(workdir: str) -> Path:
    """Makes the folder. Raises PreflightError when it cannot be."""
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise preflight.PreflightError(f"workdir '{workdir}' cannot be written: {problem.strerror}") from problem
    return Path(workdir)
