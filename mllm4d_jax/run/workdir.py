"""The folder of a run, and what is said on the terminal once per run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.parallel import multihost
from mllm4d_jax.report.reading import FACTS
from mllm4d_jax.run import preflight


def say(text: str) -> None:
    """Prints, once per run."""
    if multihost.is_primary():
        print(text, flush=True)


def write_facts(folder: Path, facts: Mapping[str, object]) -> None:
    """Print what a run is, and write it down for its page, once per run."""
    if multihost.is_primary():
        write_json(folder / FACTS, facts)
    say("\n".join(f"{name}: {value}" for name, value in facts.items()))


def open_workdir(workdir: str) -> Path:
    """Makes the folder. Raises PreflightError when it cannot be."""
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise preflight.PreflightError(f"workdir '{workdir}' cannot be written: {problem.strerror}") from problem
    return Path(workdir)
