"""Files of records: where each is, what breaks, and whether a file changed."""

from __future__ import annotations

import json

import pytest

from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import parse_record

USER = {"from": "human", "value": "<video>\nWhich way?\nA. left\nB. right"}
BOT = {"from": "gpt", "value": " B\n"}


def write(tmp_path, records, name="records.json"):
    path = tmp_path / name
    path.write_text(json.dumps(records))
    return path


def reason(call):
    with pytest.raises(RecordError) as caught:
        call()
    return caught.value.reason, str(caught.value)


def test_conversations(tmp_path):
    path = write(tmp_path, [{"video": "v/a.mp4", "conversations": [USER, BOT]}])
    record = RecordFile(path, tmp_path)[0]
    assert record.key == "records.json#0"
    assert record.messages == (
        {
            "role": "user",
            "content": [
                {"type": "video", "path": str(tmp_path.resolve() / "v/a.mp4")},
                {"type": "text", "text": "Which way?\nA. left\nB. right"},
            ],
        },
        {"role": "assistant", "content": " B\n"},
    )


def test_messages_with_several_files(tmp_path):
    raw = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First <image> then <video><video>"},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": "and <image>?"},
        ],
        "videos": ["a.mp4", "b.mp4"],
        "images": ["c.png", "d.png"],
        "solution": [{"answer": "A"}],
    }
    messages = parse_record(raw, "k", tmp_path).messages
    flat = [p.get("path", p.get("text")) for m in messages if m["role"] == "user" for p in m["content"]]
    root = tmp_path.resolve()
    assert flat == [
        "First",
        str(root / "c.png"),
        "then",
        str(root / "a.mp4"),
        str(root / "b.mp4"),
        "and",
        str(root / "d.png"),
        "?",
    ]
    assert RecordFile(write(tmp_path, [raw]), tmp_path).raw(0)["solution"] == [{"answer": "A"}]


def test_broken_json_names_file_record_line_and_column(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"conversations": []}\n{"a": 1, "b" 2}\n\n[1]\n{"x": "\\ud83d\\ude00", "y": }\n')
    records = RecordFile(path, tmp_path)
    assert len(records) == 4
    why, text = reason(lambda: records.raw(1))
    assert why == "bad_json" and "line 2, column 14" in text and str(path) in text and "r.jsonl#1" in text
    assert reason(lambda: records.raw(2))[0] == "bad_record"
    assert "line 5, column 28" in reason(lambda: records.raw(3))[1]
    path.write_bytes(b'[{"a": "\xff"}]')
    why, text = reason(lambda: RecordFile(path, tmp_path).raw(0))
    assert why == "bad_json" and "column 9" in text and "UTF-8" in text


def test_digest_follows_content(tmp_path):
    one, two = write(tmp_path, [{}], "a.json"), write(tmp_path, [{}, {}], "b.json")
    copy = write(tmp_path, [{}], "c.json")
    digests = [RecordFile(p, tmp_path).digest for p in (one, two, copy)]
    assert digests[0] == digests[2] != digests[1]
