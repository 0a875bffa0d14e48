"""Scores predictions that are there already: those of a run, or published ones. No model, no videos.

A published file is a list of questions (see `qa.benchmarks`) with a `response` each, as VLM4D results are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_collections

from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.eval import scoring, tables
from mllm4d_jax.eval.predictions import Prediction, PredictionError, prediction_files, read_predictions
from mllm4d_jax.eval.questions import BenchmarkError, question_files, read_benchmark
from mllm4d_jax.eval.statistics import Bootstrap
from mllm4d_jax.files import jsonl
from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.report.reading import SCORED


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Scores what `config.rescore.path` names, writes what `publish` does into the workdir and prints the tables.

    Raises:
      PredictionError, BenchmarkError, ScoringError, RecordFileError: files that cannot be used.
    """
    predictions = read_any(config.rescore.path, config.benchmark)
    publish(
        predictions,
        workdir,
        extractor=config.extractor,
        bootstrap=Bootstrap(config.bootstrap.samples, config.seed),
        controls=[read_any(path, config.benchmark) for path in config.controls],
        compare=read_any(config.compare, config.benchmark) if config.compare else (),
    )
    return 0


def publish(
    predictions: Sequence[Prediction],
    workdir: str | Path,
    *,
    extractor: str,
    bootstrap: Bootstrap,
    controls: Sequence[Sequence[Prediction]] = (),
    compare: Sequence[Prediction] = (),
    unusable: int = 0,
) -> dict[str, Any]:
    """Write results.json, results.md and scored.jsonl; print the results and return them (see `scoring.results`).

    scored.jsonl has the predictions with what the extractor made of them, for the page of the run.

    Args:
      unusable: questions of the run that could not be asked: in no figure, but said, and in the results by this name.
    """
    found = scoring.results(predictions, extractor=extractor, bootstrap=bootstrap, controls=controls, compare=compare)
    found["unusable"] = unusable
    tables.write_results(workdir, found)
    scored = scoring.score(predictions, extractor)
    rows = (one.prediction.to_row() | asdict(one.found) | {"correct": one.correct} for one in scored)
    write_atomic(Path(workdir) / SCORED, jsonl.encoded(rows))
    print(tables.markdown(found), flush=True)
    return found


def read_any(path: str | Path, benchmark: str) -> tuple[Prediction, ...]:
    """Predictions of a run (a file or its workdir), or published ones (a file, or a folder of files).

    Args:
      benchmark: how the questions of published files are laid out.

    Raises:
      PredictionError: nothing there, or a published question without a response; BenchmarkError: unusable questions.
    """
    path = Path(path)
    if path.is_dir() and any(path.glob("predictions*.jsonl")):
        return read_predictions(path)
    try:
        files = question_files(path)
    except BenchmarkError:
        raise PredictionError(
            f"{path}: no such file, and no folder with predictions*.jsonl or with published .json files"
        ) from None
    if len(files) == 1 and _is_of_a_run(files[0]):
        return read_predictions(prediction_files(files[0])[0])
    found, silent = [], []
    for item, raw in read_benchmark(benchmark, files, None):
        response = raw.get("response")
        if not isinstance(response, str):
            silent.append(item.id)
            continue
        found.append(Prediction.of(item, response, prompt_mode="published", config="published"))
    if silent:
        raise PredictionError(
            f"{path}: {len(silent)} questions have no text 'response', the first are {', '.join(silent[:5])}; a "
            "question without an answer needs an empty one"
        )
    return tuple(found)


def _is_of_a_run(path: Path) -> bool:
    """Whether the file's first readable record is a line that a run wrote."""
    records = RecordFile(path, "")
    for n in range(len(records)):
        try:
            return "truth" in (raw := records.raw(n)) and "config" in raw
        except RecordError:
            continue
    return False
