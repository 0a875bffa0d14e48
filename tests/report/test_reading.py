"""What is read of a workdir, and what is left out."""

from __future__ import annotations

import json
import math

import pytest

from mllm4d_jax.report import reading
from mllm4d_jax.report.reading import ReportError, read_at, read_run
from tests.report.workdirs import write_eval, write_lines


def test_lines_that_are_no_objects_are_counted_and_a_half_written_last_one_is_not(tmp_path):
    good = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}]
    text = "\n".join([json.dumps(good[0]), "[1]", "{broken", json.dumps(good[1]), "", json.dumps(good[2]), "[" * 10**5])
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 3, "lo', encoding="utf-8")
    run = read_run(tmp_path)
    assert [(row["step"], row["loss"]) for row in run.metrics] == [(1, 2.0), (2, 3.0)]  # in order; the later one counts
    assert run.notes == ("metrics.jsonl: 3 lines are not JSON objects and were left out",)


def test_a_last_line_without_a_line_break_counts_if_it_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")
    assert [row["step"] for row in read_run(tmp_path).metrics] == [1, 2]


def test_rows_without_a_finite_step_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n{"step": "x"}\n{"step": NaN}\n{"step": true}\n')
    assert [row["step"] for row in read_run(tmp_path).metrics] == [1]


def test_repeated_completions_count_once_and_are_read_from_their_place(tmp_path):
    rows = [{"step": 1, "key": "a", "branch": b, "completion": f"old {b} é"} for b in range(3)]
    rows += [{"step": 1, "key": "a", "branch": 1, "completion": "new"}, {"completion": "has no names"}]
    write_lines(tmp_path / "completions.jsonl", rows)
    whole = (tmp_path / "completions.jsonl").read_text()
    (tmp_path / "completions.jsonl").write_text(f"broken é\n\n{whole}", encoding="utf-8")
    places = read_run(tmp_path).completions
    assert [read_at(one.place)["completion"] for one in places] == ["old 0 é", "new", "old 2 é", "has no names"]


def test_files_of_all_hosts_are_read_and_no_id_twice(tmp_path):
    for name, ids in (("predictions.jsonl", "ab"), ("predictions.10.jsonl", "e"), ("predictions.2.jsonl", "bcd")):
        write_lines(tmp_path / name, [{"id": i, "letter": "A", "correct": True} for i in ids])
    write_lines(tmp_path / "predictions.old.jsonl", [{"id": "z"}])
    write_lines(tmp_path / "quarantine.1.jsonl", [{"key": "k"}])
    run = read_run(tmp_path)
    assert [one.id for one in run.predictions] == list("abcde")
    assert run.quarantine == ({"key": "k"},)


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        ({"letter": "A", "correct": True}, "correct"),
        ({"letter": "A", "correct": False}, "wrong"),
        ({"letter": None, "correct": True}, "unparsed"),
        ({"letter": "A", "correct": "yes"}, "wrong"),
        ({}, "unparsed"),
    ],
)
def test_an_answer_without_a_letter_is_unparsed_and_never_right(row, outcome):
    assert reading.outcome_of_prediction(row) == outcome


@pytest.mark.parametrize("names", [(), ("config.json", "quarantine.jsonl"), ("metrics.jsonl",)])
def test_a_workdir_with_nothing_to_show_is_an_error(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("", encoding="utf-8")
    with pytest.raises(ReportError, match="nothing to report on: none of metrics.jsonl, .*results.json"):
        read_run(tmp_path)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="is not a folder"):
        read_run(tmp_path / "none")


def test_broken_json_files_are_noted(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "results.json").write_bytes(b"\xff\xfe")
    run = read_run(tmp_path)
    assert run.config == {} and run.results is None
    assert [note.split(" ")[0] for note in run.notes] == ["results.json", "config.json"]


def test_numbers_and_texts_of_any_value():
    assert reading.number(2) == 2.0
    assert all(math.isnan(reading.number(v)) for v in (True, "1", None, [1], 10**400))
    assert [reading.text(v) for v in ("a", None, 0, [1, "é"])] == ["a", "", "0", '[1, "é"]']


def test_config_is_flat(tmp_path):
    run = read_run(write_eval(tmp_path, clips=1))
    assert dict(run.config) == {"task": "eval", "seed": 0, "model.path": "weights/0"}
