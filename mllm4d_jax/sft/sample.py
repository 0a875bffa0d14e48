"""What a tiny run needs and the user did not give: a sample world, and a tiny random model that knows its words."""

from __future__ import annotations

import json
from pathlib import Path

import ml_collections

from mllm4d_jax.data.samples import write_sample_world
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.run import preflight
from mllm4d_jax.run.build import open_records
from mllm4d_jax.run.tiny import write_tiny_model

_TOKENIZER_RECORDS = 1000  # records a tiny model's tokenizer is learned from


def with_sample(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """The config with the tiny sample in place of what is not configured; unchanged without data.sample.

    Without data of the user's own, the sample world is written; without a model, a tiny random one whose tokenizer is
    learned from the records.

    Raises:
      PreflightError: data.path or data.mixture names something that holds no records.
    """
    if not config.data.sample:
        return config
    config = config.copy_and_resolve_references()
    sample = workdir / "sample"
    if not config.data.path and not config.data.root and not config.data.mixture:
        records = write_sample_world(sample / "world", config.seed)
        config.data.path, config.data.root = str(records), str(records.parent)
    if not config.model.path:
        problems = list(preflight.data_problems(config))
        if problems:
            raise preflight.PreflightError("; ".join(problems))
        write_tiny_model(sample / "model", record_texts(open_records(config)) + _reasoning(sample), config.seed)
        config.model.path = str(sample / "model")
    return config


def _reasoning(sample: Path) -> list[str]:
    """Answers of the sample world's cold start, so that the tokenizer of the runs to come knows their words."""
    file = sample / "world" / "cold_start.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [row["conversations"][-1]["value"] for row in rows]


def record_texts(mixture: Mixture) -> list[str]:
    """Texts of the first records, for a tokenizer; records that cannot be read are left to the loader to report."""
    texts = []
    for source in mixture.sources:
        for i in range(min(len(source), _TOKENIZER_RECORDS)):
            try:
                messages = source[i].messages
            except RecordError:
                continue
            parts = [p for m in messages for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
            texts += [
                p if isinstance(p, str) else p["text"] for p in parts if isinstance(p, str) or p["type"] == "text"
            ]
    return texts
