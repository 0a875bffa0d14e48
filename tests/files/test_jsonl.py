"""JSON Lines files: what a kill leaves is repaired, any other damage is named, and nothing is lost silently."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

from mllm4d_jax.files import jsonl
from mllm4d_jax.files.jsonl import JsonLinesError

HALF = '{"step": 9, "lo'


def write(path, *steps, tail=""):
    jsonl.append(path, [{"step": step, "text": f"é{step}\u2028"} for step in steps])
    with path.open("a") as file:
        file.write(tail)
    return path


def steps(path):
    return [row["step"] for row in jsonl.read_steps(path)]


def test_rows_come_back_and_no_reader_finds_a_line_break_in_one(tmp_path):
    rows = [{"text": "a\nb\r\u2028\x85 ü \ud800"}, {"n": 1, "x": [None, {"y": 0.1}]}]
    jsonl.append(tmp_path / "a", rows[:1])
    jsonl.append(tmp_path / "a", rows[1:])
    assert [line.row for line in jsonl.read(tmp_path / "a")] == rows
    assert len((tmp_path / "a").read_text().splitlines()) == 2
    assert list(jsonl.read(tmp_path / "absent")) == list(jsonl.scan(tmp_path / "absent")) == []


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_half_written_last_line_does_not_count_and_is_cut_off(tmp_path, cut):
    path = write(tmp_path / "a", 1, 2)
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert steps(path) == [1]
    jsonl.rewind(path)
    assert steps(write(path, 3)) == [1, 3]


def test_a_whole_last_line_without_its_line_break_is_kept(tmp_path):
    path = write(tmp_path / "a", 1, 2)
    path.write_bytes(path.read_bytes()[:-1])
    assert steps(path) == [1, 2]
    jsonl.rewind(path, 2)
    assert steps(write(path, 3)) == [1, 2, 3]


DAMAGE = [
    b"[1]",
    b"{broken",
    b"12",
    b'"step"',
    b"null",
    b"\0" * 9,
    b"\xff\xfe{}",
    b"{}\0",
    b"[" * 10**5,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:6]))
def test_damage_before_the_end_is_named_with_its_line(tmp_path, damage):
    path = write(tmp_path / "a", 1)
    with path.open("ab") as file:
        file.write(damage + b"\n\n")
    write(path, 2, tail=HALF)
    with pytest.raises(JsonLinesError, match=r"a, line 2: not a JSON object\. .* delete it"):
        list(jsonl.read(path))
    before = path.read_bytes()
    with pytest.raises(JsonLinesError, match="line 2: not a JSON object"):
        jsonl.rewind(path, 0)
    assert path.read_bytes() == before
    found = list(jsonl.scan(path))
    assert [(line.number, line.row is not None, line.ended) for line in found] == [
        (1, True, True), (2, False, True), (4, True, True), (5, False, False)]  # fmt: skip
    assert all(before[line.start :].startswith(b"{") for line in (found[0], found[2], found[3]))


def test_a_row_without_a_step_cannot_be_rewound_past(tmp_path):
    path = tmp_path / "a"
    jsonl.append(path, [{"step": 1}, {"loss": 2}, {"step": 2}])
    with pytest.raises(JsonLinesError, match="line 2: has no whole number 'step'"):
        jsonl.rewind(path, 1)
    with pytest.raises(JsonLinesError, match="line 2: has no whole number 'step'"):
        jsonl.read_steps(path, 1)
    assert len(jsonl.read_steps(path)) == 3
    path.write_text("".join(f'{{"step": {n}}}\n' for n in (1, 2, 3)))
    assert [row["step"] for row in jsonl.read_steps(path, 2)] == [1, 2]


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"\xff\xfe", b'{"step": 3, "text": "\xc3', b"nul", b"null"])
def test_what_a_crash_leaves_at_the_end_is_cut_off(tmp_path, tail):
    """File systems may leave NULs there, or half a character."""
    path = write(tmp_path / "a", 1, 2)
    with path.open("ab") as file:
        file.write(tail)
    assert steps(path) == [1, 2]
    jsonl.rewind(path, 2)
    assert steps(write(path, 3)) == [1, 2, 3]


@pytest.mark.parametrize("value", ['"1"', "null", "true", "[1]", "{}", "1" * 400])
def test_fields_that_have_to_be_numbers_are(tmp_path, value):
    path = tmp_path / "a"
    path.write_text(f'{{"step": 1, "loss": 0.5}}\n{{"step": 2, "loss": {value}}}\n{{"step": 3}}\n')
    assert len(jsonl.read_steps(path, 1, numbers=("loss",))) == 1
    with pytest.raises(JsonLinesError, match="a, line 2: has no number 'loss'. .* delete it"):
        jsonl.read_steps(path, 2, numbers=("loss",))
    if value == "null":
        assert jsonl.read_steps(path, 2, measured=("loss",))[1]["loss"] is None
        with pytest.raises(JsonLinesError, match="a, line 3: has no number 'loss'"):
            jsonl.read_steps(path, measured=("loss",))
    else:
        with pytest.raises(JsonLinesError, match="a, line 2: has no number 'loss'"):
            jsonl.read_steps(path, 2, measured=("loss",))
    path.write_text('{"step": true}\n')
    with pytest.raises(JsonLinesError, match="line 1: has no whole number 'step'"):
        jsonl.read_steps(path, 2)


@pytest.mark.parametrize("step", range(5))
def test_rewinding_is_what_keeping_the_earlier_rows_is(tmp_path, step):
    rows = [{"step": s, "text": "x" * 1000 * s} for s in (1, 1, 2, 3, 3, 3, 4)]
    jsonl.append(tmp_path / "a", rows)
    jsonl.rewind(tmp_path / "a", step)
    assert [line.row for line in jsonl.read(tmp_path / "a")] == [row for row in rows if row["step"] <= step]
    jsonl.rewind(tmp_path / "absent", step)
    assert not (tmp_path / "absent").exists()


def test_lines_longer_than_a_block_and_ends_of_lines_at_its_border(tmp_path, monkeypatch):
    rows = [{"step": s, "text": "x" * n} for s, n in enumerate((0, 5, 7, 100, 3, 64, 1, 300, 2))]
    for block in range(1, 80):
        monkeypatch.setattr(jsonl, "_BLOCK", block)
        path = tmp_path / str(block)
        jsonl.append(path, rows)
        jsonl.rewind(path, 3)
        assert steps(path) == [0, 1, 2, 3]
        with path.open("ab") as file:
            file.write(b"{\n")
        with pytest.raises(JsonLinesError, match="line 5"):
            jsonl.rewind(path)


def test_a_file_larger_than_memory_is_rewound_at_once(tmp_path):
    """Eight GiB, a hole on disk: had it been read whole, or from its start, this would take minutes and all memory."""
    path = tmp_path / "completions.jsonl"
    with path.open("wb") as file:
        file.truncate(8 << 30)
        file.seek(8 << 30)
        file.write(b"\n")
        for step in range(1, 400):
            file.write(json.dumps({"step": step, "completion": "x" * 2000}).encode() + b"\n")
        size = file.tell()
        file.write(HALF.encode())
    tracemalloc.start()
    started = time.monotonic()
    jsonl.rewind(path, 398)
    assert path.stat().st_size == size - len(json.dumps({"step": 399, "completion": "x" * 2000})) - 1
    jsonl.rewind(path, 200)
    assert time.monotonic() - started < 5 and tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_the_files_of_all_hosts_are_told_by_their_numbers(tmp_path):
    path = tmp_path / "predictions.jsonl"
    for host in (10, 2, 0):
        jsonl.append(jsonl.of_host(path, host), [{"host": host}])
    for name in ("predictions.old.jsonl", "predictions2.jsonl", "other.1.jsonl", "predictions.1.json"):
        (tmp_path / name).write_text("{}\n")
    assert [file.name for file in jsonl.of_all_hosts(path)] == [
        "predictions.jsonl", "predictions.2.jsonl", "predictions.10.jsonl"]  # fmt: skip
    path.unlink()
    assert jsonl.of_all_hosts(path)[0].name == "predictions.2.jsonl"
    assert jsonl.of_all_hosts(tmp_path / "none" / "a.jsonl") == []
