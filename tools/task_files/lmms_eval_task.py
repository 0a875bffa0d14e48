"""A task of lmms-eval: questions with one right option, scored by the strict rules. See tools/eval_tasks.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mllm4d_jax.qa.answers import extract_answer


def doc_to_visual(doc: Mapping[str, Any]) -> list[str]:
    """Return the video of a question, for models that take text and videos apart."""
    return [doc["video"]]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return the text of a question, for the same models."""
    parts = [part for message in json.loads(doc["messages"]) for part in message["content"]]
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the conversation to be continued, for models that take one."""
    messages = json.loads(doc["messages"])
    for part in (part for message in messages for part in message["content"]):
        if part["type"] == "video":
            part["url"] = doc["video"]
    return messages


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return the metrics that the question counts for, with its score; what cannot be read is wrong."""
    found = extract_answer(results[0], json.loads(doc["choices"]))
    right = float(found.letter in doc["truth"])
    other = {"unparsed": float(found.letter is None), "mean_over_subtasks": [doc["subtask"], right]}
    return {metric: other.get(metric, right) for metric in doc["metrics"]}


def mean_over_subtasks(scores: Sequence[Sequence[Any]]) -> float:
    """Return the mean over the subtasks of the share of right answers."""
    by_subtask: dict[str, list[float]] = {}
    for subtask, right in scores:
        by_subtask.setdefault(subtask, []).append(right)
    return sum(sum(found) / len(found) for found in by_subtask.values()) / len(by_subtask)
