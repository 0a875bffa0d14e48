"""Tables of records: Parquet and text with tabs."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest

from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.data.table_file import TableFile
from mllm4d_jax.qa.benchmarks import PARSERS
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import parse_record
from tests.eval.public_benchmarks import DISTANCES, vsi_row, write_parquet, write_tsv

ROWS = [vsi_row(0, "object_rel_distance", "A"), vsi_row(1, "object_counting", "4", question='How\tmany\n"ones"? é')]


def test_parquet(tmp_path):
    table = TableFile(write_parquet(tmp_path, ROWS))
    assert len(table) == 2 and [table.raw(n) for n in range(2)] == ROWS
    assert table.key(1) == "test.parquet#1"


def test_tabs(tmp_path):
    table = TableFile(write_tsv(tmp_path, ROWS))
    assert len(table) == 2
    assert table.raw(0)["options"] == str(DISTANCES) and table.raw(1)["options"] == ""
    assert table.raw(1)["question"] == ROWS[1]["question"]


@pytest.mark.parametrize(("line", "bad"), [("a\tb\tc\n", True), ("a\n", True), ("a\tb\n", False), ("\tb\n", False)])
def test_a_row_with_other_cells_than_heads_is_named(tmp_path, line, bad):
    (tmp_path / "x.tsv").write_text("one\ttwo\n" + line)
    table = TableFile(tmp_path / "x.tsv")
    if bad:
        with pytest.raises(RecordError, match="x.tsv#0: has more or fewer cells"):
            table.raw(0)
    else:
        assert list(table.raw(0)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"{}", "x.parquet cannot be read as a .parquet file"),
        ("x.parquet", b"", "x.parquet cannot be read as a .parquet file"),
        ("x.tsv", b"one\ttwo\n\xff\t2\n", "x.tsv cannot be read as a .tsv file"),
        ("x.tsv", b'one\ttwo\n"1\t2\n', "x.tsv cannot be read as a .tsv file"),
        ("x.tsv", None, "x.tsv: no such file"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordFileError, match=message):
        TableFile(tmp_path / name)


def test_what_a_row_of_a_table_lacks_is_null_and_means_nothing(tmp_path):
    """One schema for all rows: letters that other rows have, and the fields of another layout."""
    asked = {"role": "user", "content": "<video>\nWhere?\nOptions:\nA. here\nB. there"}
    four = {letter: f"{letter.lower()} m" for letter in "ABCD"}
    rows = [
        {"id": "1", "video": "a.mp4", "question": "How far?", "choices": four, "answer": "A"},
        {"id": "2", "video": "a.mp4", "question": "Moves it?", "choices": {"A": "yes", "B": "no"}, "answer": "no"},
        {"id": "3", "videos": ["a.mp4"], "messages": [asked], "answer": "B"},
        {"id": "4", "video": "a.mp4", "messages": [asked, {"role": "assistant", "content": "A"}]},
    ]
    path = tmp_path / "rows.parquet"
    columns = dict.fromkeys(name for row in rows for name in row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns | row for row in rows]), path)
    table = TableFile(path)
    assert table.raw(1)["choices"]["D"] is None and table.raw(1)["messages"] is None
    found = [PARSERS["jsonl"](table.raw(i), "rows", table.key(i), None) for i in range(4)]
    assert [list(one.choices) for one in found] == [list("ABCD"), list("AB"), list("AB"), list("AB")]
    assert [one.truth for one in found] == [("A",), ("B",), ("B",), ("A",)]
    assert [one.question for one in found] == ["How far?", "Moves it?", "Where?", "Where?"]
    parsed = [parse_record(table.raw(i), table.key(i), tmp_path) for i in (2, 3)]
    assert [len(record.messages) for record in parsed] == [1, 2]


def test_a_letter_that_a_row_lacks_does_not_make_its_options_texts():
    row = {"id": "validation_1", "video": "videos_real/a.mp4", "question": "How many?", "answer": "2"}
    one = PARSERS["vlm4d"](row | {"choices": {"A": 1, "B": 2, "C": None}}, "real", "k", None)
    assert (dict(one.choices), one.subtask, one.truth) == ({"A": "1", "B": "2"}, "numeric", ("B",))
