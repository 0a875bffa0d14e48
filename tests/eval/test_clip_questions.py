"""Questions about a clip: what is read of a typed line and of a record, and what is refused."""

from __future__ import annotations

import json

import pytest

from mllm4d_jax.eval.asking import Manner
from mllm4d_jax.eval.clip_questions import ClipQuestionError, read_questions, record_questions, typed_question
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.options import INSTRUCTION
from tests.eval.question_fixtures import write_rows

DIRECT, REASONING = Manner("direct", None, False), Manner("st_cot", "Think.", False)
MEDIA = [{"type": "video", "path": "/a.mp4"}]
SOLUTION = {"answer": "B", "camera_center": [[0, 0, 0], [1, 0, 2]], "object_center": None}
TEXT = "<video>\nWhich way?\nOptions:\nA. left\nB. right"
ROWS = [
    {"id": "first", "messages": [{"role": "user", "content": TEXT}], "videos": ["v/a.mp4"], "solution": [SOLUTION]},
    {"video": "v/b.mp4", "question": "Which way?", "choices": {"A": "left", "B": "right"}, "answer": "right"},
    {"video": "v/a.mp4", "conversations": [{"from": "human", "value": "<video>What moves?"},
                                           {"from": "gpt", "value": "A dog."}]},
    {"video": "v/c.mp4", "conversations": [{"from": "human", "value": TEXT}], "solution": {"answer": 7}, "answer": "A"},
]  # fmt: skip


def asked(question):
    return question.record.messages[-1]["content"][-1]["text"]


@pytest.mark.parametrize(
    ("text", "question", "choices", "prompt"),
    [
        ("What moves?", "What moves?", {}, "What moves?"),
        ("Which? | left | right", "Which?", {"A": "left", "B": "right"}, "Which?\nOptions:\nA. left\nB. right"),
        ("Which? | A. left | B) right ", "Which?", {"A": "left", "B": "right"}, "Which?\nOptions:\nA. left\nB. right"),
        (
            "Which? | B. left | A. up",
            "Which?",
            {"A": "B. left", "B": "A. up"},
            "Which?\nOptions:\nA. B. left\nB. A. up",
        ),
        ("Is |x| 2 m?", "Is |x| 2 m?", {}, "Is |x| 2 m?"),
    ],
)
def test_a_typed_question(text, question, choices, prompt):
    found = typed_question(text, "line 1", MEDIA, DIRECT)
    assert (found.text, found.choices, found.truth, found.record.key) == (question, choices, (), "line 1")
    assert asked(found) == (f"{prompt}\n{INSTRUCTION}" if choices else prompt)
    reasoned = typed_question(text, "line 1", MEDIA, REASONING)
    assert asked(reasoned) == prompt and reasoned.record.messages[0] == {"role": "system", "content": "Think."}


def test_a_question_with_its_options_in_lines_is_asked_to_the_letter():
    text = "Which way?\nA. left\nB. right\nSay a letter."
    found = typed_question(text, "q", MEDIA, DIRECT)
    assert asked(found) == text and found.text == "Which way?" and found.choices == {"A": "left", "B": "right"}
    unordered = typed_question("Who won?\nB. Smith\nA. Jones", "q", MEDIA, DIRECT)
    assert not unordered.choices and unordered.text == asked(unordered)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  ", "line 4: nothing is asked"),
        ("| left | right", "line 4: nothing is asked"),
        ("Which? | left", r"line 4: it has the options \['left'\]: there must be 2 to 26"),
        ("Which? | left |  | up", "none blank"),
        ("Which?" + " | x" * 27, "2 to 26"),
        ("What \udce9?", "line 4: the question holds half a surrogate pair"),
    ],
)
def test_typed_lines_that_are_none(text, message):
    with pytest.raises(RecordError, match=message):
        typed_question(text, "line 4", MEDIA, DIRECT)


def test_a_file_of_questions(tmp_path):
    (tmp_path / "q.txt").write_text("\ufeffWhat moves?\r\n\nWhich? | a | b\n", encoding="utf-8")
    found = read_questions(str(tmp_path / "q.txt"), MEDIA, DIRECT)
    assert [one.text for one in found] == ["What moves?", "Which?"]
    assert [one.record.key for one in found] == ["q.txt, line 1", "q.txt, line 3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", None, "q.txt cannot be read .No such file"),
        ("q.txt", b"\n \n", "q.txt holds no question"),
        ("q.txt", b"What?\n\xff\xfe", "q.txt is not UTF-8 text .byte 6"),
        ("q.txt", b"What?\nWhich? | a\n", "q.txt, line 2: it has the options"),
        ("q.json", b"[]", "is a file of records: name one with --config.record="),
    ],
)
def test_files_without_questions(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ClipQuestionError, RecordError), match=message):
        read_questions(str(tmp_path / name), MEDIA, DIRECT)


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path, ROWS, "a:b.json")


@pytest.mark.parametrize(
    ("key", "texts"),
    [
        ("0", ["Which way?"]),
        ("a:b.json#0", ["Which way?"]),
        ("first", ["Which way?"]),
        ("v/a.mp4", ["Which way?", "What moves?"]),
    ],
)
def test_records_are_named_by_number_id_and_video(file, key, texts):
    found = record_questions(f"{file}:{key}", "", DIRECT)
    assert [one.text for one in found] == texts
    assert found[0].record.messages[-1]["content"][0] == {"type": "video", "path": str(file.parent / "v/a.mp4")}
    assert found[0].truth == ("B",) and found[0].solution.camera_center == ((0, 0, 0), (1, 0, 2))


def test_records_of_other_kinds(file):
    (plain,) = record_questions(f"{file}:1", "/videos", REASONING)
    assert plain.truth == ("B",) and asked(plain) == "Which way?\nOptions:\nA. left\nB. right"
    assert plain.record.messages[0]["content"] == "Think."
    assert plain.record.messages[1]["content"][0]["path"] == "/videos/v/b.mp4"
    (free,) = record_questions(f"{file}:2", "", DIRECT)
    assert (free.text, free.choices, free.truth) == ("What moves?", {}, ("A dog.",))
    assert len(free.record.messages) == 1 and "no options" in free.notes[0]
    (odd,) = record_questions(f"{file}:3", "", DIRECT)
    assert odd.truth == ("A",) and odd.solution is None and "'solution.answer' must be" in odd.notes[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}", "names a file and no record in it: write FILE:KEY"),
        ("{file}:", "names a file and no record in it"),
        ("{file}:4", "has 4 records, numbered from 0"),
        ("{file}:" + "9" * 30, "has 4 records, numbered from 0"),
        ("{file}:v/a.mp", "no id and no video 'v/a.mp', did you mean 'v/a.mp4'"),
        ("none.json:0", "record = none.json:0: no such file of records"),
    ],
)
def test_records_that_are_not_there(file, spec, message):
    with pytest.raises(ClipQuestionError, match=message):
        record_questions(spec.format(file=file), "", DIRECT)


def test_records_that_cannot_be_asked(tmp_path):
    rows = [{"video": "v.mp4"}, {"video": "../v.mp4", "conversations": ROWS[2]["conversations"]}]
    file = write_rows(tmp_path, rows)
    with pytest.raises(RecordError, match="questions.json#0: 'choices' must be"):
        record_questions(f"{file}:0", "", DIRECT)
    with pytest.raises(RecordError, match="questions.json#1: media path '../v.mp4' leaves"):
        record_questions(f"{file}:1", "", DIRECT)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"video": \n' + json.dumps(ROWS[1]) + "\n")
    assert len(record_questions(f"{broken}:v/b.mp4", "", DIRECT)) == 1
    with pytest.raises(ClipQuestionError, match="1 of its records cannot be read"):
        record_questions(f"{broken}:x", "", DIRECT)
