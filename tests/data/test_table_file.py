"""Tables of records: Parquet and text with tabs."""

from __future__ import annotations

import pytest

from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.data.table_file import TableFile
from mllm4d_jax.qa.errors import RecordError
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
