"""Finding records in a file: against the standard parser on the whole file, with small chunks, and on damaged files."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from mllm4d_jax.data.json_index import RecordFileError, build_index

NASTY = [
    'quote " inside',
    "back\\slash\\",
    "brackets ]}{[ and , commas",
    "newline\nand\ttab",
    "\u00e9\u4f60\U0001f600",
    "<video>\\",
]


def make_records(seed: int, count: int) -> list[dict]:
    rng = random.Random(seed)
    turn = lambda who: {"from": who, "value": "".join(rng.choices(NASTY, k=rng.randint(0, 3)))}  # noqa: E731
    return [
        {"video": f"v{i}.mp4", "n": rng.choice([1, -2.5e3, None, True]), "conversations": [turn("user"), turn("gpt")]}
        for i in range(count)
    ]


def read_all(path, chunk):
    index = build_index(path, chunk)
    return index, [index.read(i) for i in range(len(index))]


def parsed(pieces):
    """Records by position; None where the piece does not parse."""
    out = []
    for piece in pieces:
        try:
            out.append(json.loads(piece))
        except ValueError:
            out.append(None)
    return out


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
@pytest.mark.parametrize("style", ["compact", "indented", "ascii", "jsonl", "crlf"])
def test_every_record_is_found(tmp_path, style, chunk):
    records = make_records(0, 23)
    text = {
        "compact": json.dumps(records, separators=(",", ":"), ensure_ascii=False),
        "indented": "\n " + json.dumps(records, indent=2) + "\n\n",
        "ascii": json.dumps(records),
        "jsonl": "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records),
        "crlf": "".join(json.dumps(r) + "\r\n" for r in records),
    }[style]
    path = tmp_path / "records.json"
    path.write_bytes(text.encode())
    index, pieces = read_all(path, chunk)
    assert parsed(pieces) == records
    assert index.digest == hashlib.sha256(text.encode()).hexdigest()


def test_byte_order_mark_and_empty_list(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(make_records(1, 3)).encode())
    assert len(build_index(path)) == 3
    path.write_text("[ ]")
    assert len(build_index(path)) == 0


def damaged(kind: str, element: str) -> str:
    if kind == "missing brace":
        return element[:-1]
    if kind == "missing bracket":
        return element[:-2] + "}"
    if kind == "one bare quote":
        return element.replace('"value": "', '"value": "said "so', 1)
    if kind == "two bare quotes":
        return element.replace('"value": "', '"value": "said "so" ', 1)
    if kind == "trailing comma":
        return element[:-1] + ",}"
    if kind == "bare word":
        return element.replace("null", "nil").replace("true", "TRUE").replace('"n"', "n", 1)
    return "%$!"


KINDS = [
    "missing brace",
    "missing bracket",
    "one bare quote",
    "two bare quotes",
    "trailing comma",
    "bare word",
    "noise",
]


@pytest.mark.parametrize("chunk", [13, 100_000])
@pytest.mark.parametrize("separator", [", ", ",\n  "])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [0, 4, 8])
def test_a_broken_element_costs_only_itself(tmp_path, kind, separator, where, chunk):
    records = make_records(2, 9)
    elements = [json.dumps(r) for r in records]
    elements[where] = damaged(kind, elements[where])
    path = tmp_path / "r.json"
    path.write_text("[" + separator.join(elements) + "]")
    _, pieces = read_all(path, chunk)
    found = parsed(pieces)
    assert [r for r in found if r is not None] == records[:where] + records[where + 1 :]
    assert found.index(None) == where
    assert found.count(None) == 1


def test_missing_comma_extra_comma_and_missing_end(tmp_path):
    a, b, c = (json.dumps(r) for r in make_records(3, 3))
    path = tmp_path / "r.json"
    for text, want in [
        (f"[{a} {b}, {c}]", [1, 0, 1, 1]),
        (f"[{a}, {b}, {c},]", [1, 1, 1, 0]),
        (f"[{a}, {b}, {c}", [1, 1, 1, 0]),
        (f"[{a}, {b}, {c[:20]}", [1, 1, 0]),
        (f"[{a}, {b}] {c}", [1, 1, 1]),
        (f"[{a}, {b}] end", [1, 1, 0]),
    ]:
        path.write_text(text)
        _, pieces = read_all(path, 31)
        assert [int(x is not None) for x in parsed(pieces)] == want, text


@pytest.mark.parametrize("chunk", [5, 100_000])
def test_line_and_column(tmp_path, chunk):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2}\n{"id": 33}\n')
    index = build_index(path, chunk)
    assert [index.line_column(index.starts[i]) for i in range(3)] == [(1, 1), (3, 1), (4, 1)]
    assert index.line_column(index.starts[2] + 7) == (4, 8)


def test_files_that_are_no_records(tmp_path):
    with pytest.raises(RecordFileError, match="no such file"):
        build_index(tmp_path / "absent.json")
    for content, message in [("", "empty"), ("  \n", "empty"), ("video,question", "starts with 'v'")]:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(RecordFileError, match=message):
            build_index(tmp_path / "x.json")
