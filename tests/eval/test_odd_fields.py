"""Whatever JSON can hold in any field of records, questions and predictions: used, or an error that can be shown."""

from __future__ import annotations

import copy
import json

import pytest

from data_prep.cold_start.r1_items import parse_item
from mllm4d_jax.encode.chat import render_chat
from mllm4d_jax.eval import scoring
from mllm4d_jax.eval.predictions import Prediction, PredictionError
from mllm4d_jax.eval.statistics import Bootstrap
from mllm4d_jax.eval.tables import markdown
from mllm4d_jax.generate.policy import prompt_id
from mllm4d_jax.qa.benchmarks import PARSERS
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import as_scored_prompt, as_target, parse_record, unread_fields
from mllm4d_jax.qa.rewards import score
from tests.eval.question_fixtures import prediction, vlm4d_rows

ODD = [
    None,
    True,
    3,
    -1.5,
    10**400,
    float("nan"),
    1.7e308,
    "",
    " ",
    "\ud800",
    "\udc80",
    "x" * 300,
    "9" * 5000,
    "\u0663",
]
ODD += ["A", "../" * 9, "\0", [], ["A"], [["A"]], [None], [{}], {}, {"A": ["x"], "B": {}}, [1.7e308] * 3]
RECORD = {
    "id": "q1",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<video>\nWhich way?\nOptions:\nA. left\nB. right"},
        {"role": "assistant", "content": "B", "loss": True, "weight": 1},
    ],
    "videos": ["a.mp4"],
    "video_start": 0.5,
    "video_end": 1.5,
    "system": "s",
    "solution": [{"answer": "B", "camera_center": [[1, 2, 3], None], "object_center": [[1, 2, 3]]}],
    "question": "Which way?",
    "choices": {"A": "left", "B": "right"},
    "answer": "B",
    "category": "c",
    "question_type": "camera_absolute_distance",
    "frames": {"seen": [1, 2], "count": 9},
    "value": 1.0,
}
REPLY = "<thinking>Camera Center: [1, 2, 3]\nCamera Center: [1, 2, 3]</thinking><answer>B</answer>"


def read_record(raw):
    record = parse_record(raw, "k", "/media")
    unread_fields(raw)
    render_chat(as_target(record).messages, "qwen3_vl")
    score(REPLY, as_scored_prompt(record).solution)


def read_question(benchmark):
    def read(raw):
        question = PARSERS[benchmark](raw, "stem", "k", "/media")
        prompt_id(question.id)
        show([Prediction.of(question, "A", prompt_mode="direct", config="c")])

    return read


def show(predictions):
    json.dumps([one.to_row() for one in predictions]).encode()
    markdown(scoring.results(predictions, bootstrap=Bootstrap(samples=2, seed=0))).encode()


READERS = {
    "record": (RECORD, read_record),
    "vlm4d": (vlm4d_rows()[0], read_question("vlm4d")),
    "mllm4d": (RECORD, read_question("mllm4d")),
    "jsonl": (RECORD, read_question("jsonl")),
    "cold start": (RECORD, lambda raw: parse_item(raw, "k", "id")),
    "prediction": (prediction().to_row(), lambda raw: Prediction.from_row(raw, "file, line 1")),
}


def places(value, path=()):
    """Yield the path of everything below a JSON value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in below:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value, path, new):
    value = copy.deepcopy(value)
    within = value
    for key in path[:-1]:
        within = within[key]
    within[path[-1]] = new
    return value


@pytest.mark.parametrize("name", READERS)
def test_any_value_in_any_field(name):
    base, read = READERS[name]
    read(base)
    refused = 0
    for path in places(base):
        for new in ODD:
            try:
                read(changed(base, path, new))
            except (RecordError, PredictionError) as error:
                assert str(error).encode() and len(str(error)) < 2000, (path, new)
                refused += 1
    assert refused > 50
