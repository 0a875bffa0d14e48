"""Records of the R1 layout: what is read from them, and errors that name line and key."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cold_start.r1_items import UNSPECIFIED, parse_item, read_items
from data_prep.cold_start.selection import record as write_record
from data_prep.questions.propose import QuestionRules, propose
from data_prep.store.export import r1_record
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import parse_record
from tests.data_prep.scenes.random_scenes import random_scene

RELEASED = {
    "messages": [
        {"role": "user", "content": "<video>\nWhere?\nOptions:\nA. left\n(B) right\nC: 2.5\nAnswer with a letter."},
        {"role": "assistant", "content": "B"},
    ],
    "videos": "a/b.mp4",
    "solution": {"answer": "B. right", "camera_center": [[0, 0, 0], None]},
}


def write(tmp_path, *lines):
    path = tmp_path / "r1.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_released_record_gives_what_it_has():
    item = parse_item(RELEASED, "x", "fallback")
    assert (item.id, item.scenario, item.video, item.system) == ("fallback", UNSPECIFIED, "a/b.mp4", "")
    assert item.options == {"A": "left", "B": "right", "C": "2.5"}
    assert item.solution.answer == "B" and item.solution.camera_center == ((0, 0, 0), None)
    assert item.frames is None and item.value is None and item.label == item.object_name == ""
    assert item.question.startswith("Where?") and item.prompt == RELEASED["messages"][0]["content"]


def test_a_part_of_a_video_is_kept():
    record = RELEASED | {"video_start": 1, "video_end": None, "system": "Think."}
    item = parse_item(record, "x", "fallback")
    assert item.span == (1.0, None) and item.system == "Think."
    made = write_record(item, "<thinking>t</thinking><answer>B</answer>", "id")
    assert (
        "scale" not in made and write_record(dataclasses.replace(item, scale="metric"), "r", "id")["scale"] == "metric"
    )
    assert (made["video_start"], made["video_end"]) == (1.0, None) and parse_record(made, "k", "root")
    assert "video_start" not in write_record(parse_item(RELEASED, "x", "f"), "r", "id")


def test_a_curated_question_comes_back_whole():
    for question in propose(random_scene(2), QuestionRules(), seed=0):
        item = parse_item(json.loads(json.dumps(r1_record(question.record("v.mp4")))), "x", "none")
        assert (item.id, item.scenario, item.source_id) == (question.id, question.scenario, question.source_id)
        assert tuple(item.options.values()) == question.options and item.solution.answer == question.answer
        assert (item.frames, item.value) == ((*question.frames, question.count), question.value)
        assert (item.label, item.object_name) == (question.label, question.object_name)
        assert item.scale == question.scale == "metric"
        assert bool(item.object_name) == bool(question.object_id) and item.object_name in question.text
        assert [list(c) for c in item.solution.camera_center] == list(question.camera_center)


def test_ids_come_from_the_content_and_repeated_records_count_once(tmp_path):
    other = RELEASED | {"videos": ["c.mp4"]}
    items, repeated = read_items(write(tmp_path, RELEASED, "", other, RELEASED))
    again, _ = read_items(write(tmp_path, other, RELEASED))
    assert repeated == 1 and len(items) == 2 and items == again and items[0].id != items[1].id
    assert [item.id for item in items] == sorted(item.id for item in items)


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"messages": None}, "'messages'"),
        ({"messages": [{"role": "user"}]}, "'messages'"),
        ({"messages": [{"role": "user", "content": "no video"}]}, "'messages'"),
        ({"messages": [{"role": "user", "content": "<video><video>"}]}, "'messages'"),
        ({"messages": [{"role": "user", "content": "<video>"}, {"role": "user", "content": "?"}]}, "'messages'"),
        ({"messages": [{"role": "robot", "content": "<video>"}]}, "'messages'"),
        ({"videos": []}, "'videos'"),
        ({"videos": ["a", "b"]}, "'videos'"),
        ({"videos": [3]}, "'videos'"),
        ({"solution": None}, "'solution'"),
        ({"solution": [{}, {}]}, "'solution'"),
        ({"solution": {"answer": 4}}, "'solution.answer'"),
        ({"solution": {"answer": "A", "camera_center": [[1, 2]]}}, "'solution.camera_center'"),
        ({"id": 7}, "'id'"),
        ({"id": " "}, "'id'"),
        ({"question_type": ""}, "'question_type'"),
        ({"label": 5}, "'label'"),
        ({"object_name": ["x"]}, "'object_name'"),
        ({"frames": [1, 2]}, "'frames'"),
        ({"frames": {"seen": [3, 2], "count": 9}}, "'frames'"),
        ({"frames": {"seen": [2, 9], "count": 9}}, "'frames'"),
        ({"frames": {"seen": [1, 2.5], "count": 9}}, "'frames'"),
        ({"value": "far"}, "'value'"),
        ({"value": [1, 2]}, "'value'"),
        ({"value": True}, "'value'"),
        ({"value": [True]}, "'value'"),
        ({"value": []}, "'value'"),
        ({"scale": 1.0}, "'scale'"),
        ({"value": 10**400}, "'value'"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path, bad, key):
    path = write(tmp_path, RELEASED, RELEASED | bad)
    with pytest.raises(RecordError) as caught:
        read_items(path)
    assert f"{path}, line 2" in str(caught.value) and key in str(caught.value)


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"id": NaN}', '{"id": "a", "id": "a"}', '{"id": "\\ud800"}', "[" * 9999]
)
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    with pytest.raises(RecordError, match="line 2: "):
        read_items(write(tmp_path, RELEASED, line))


def test_two_records_with_one_id_name_both_lines(tmp_path):
    with pytest.raises(RecordError, match="line 3: 'id' 'q' is also that of line 1"):
        read_items(write(tmp_path, RELEASED | {"id": "q"}, RELEASED, RELEASED | {"id": "q", "label": "x"}))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecordError, match="cannot be read"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="holds no records"):
        read_items(write(tmp_path, " "))
    with pytest.raises(RecordError, match="line 1 has more than"):
        read_items(write(tmp_path, "x" * 2**20))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["seen", "count", "answer"]), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*RELEASED, "id", "frames", "value", "label", "object_name"]), VALUES))
def test_any_fields_give_an_item_or_a_clear_error(changes):
    try:
        item = parse_item(RELEASED | changes, "here", "fallback")
    except RecordError as error:
        assert str(error).startswith("here: '")
    else:
        assert item.id and item.video and item.solution.answer
