"""Files of benchmarks: which are opened, and how everything that is wrong in them is reported."""

from __future__ import annotations

import pytest

from mllm4d_jax.eval.questions import BenchmarkError, load_benchmark, question_files
from tests.eval.question_fixtures import vlm4d_rows, write_rows

GOOD = vlm4d_rows()[0]


def test_a_folder_is_all_its_files(tmp_path):
    rows = vlm4d_rows()
    write_rows(tmp_path, rows[:6], "real.json")
    write_rows(tmp_path, rows[6:], "synthetic.jsonl")
    (tmp_path / "readme.md").touch()
    assert [path.name for path in question_files(tmp_path)] == ["real.json", "synthetic.jsonl"]
    assert len(load_benchmark("vlm4d", tmp_path, None)) == 8
    with pytest.raises(BenchmarkError, match="no such file"):
        question_files(tmp_path / "nothing")


def test_all_problems_are_reported_together(tmp_path):
    rows = [*vlm4d_rows(), GOOD, *({} for _ in range(25))]
    path = write_rows(tmp_path, rows)
    with pytest.raises(BenchmarkError) as caught:
        load_benchmark("vlm4d", path, None)
    text = str(caught.value)
    assert "26 of 34 questions" in text and "and 6 more" in text
    assert "id 'real/validation_1' is also that of questions.json#0" in text
    path.write_text('{"id": "validation_1"\n', encoding="utf-8")
    with pytest.raises(BenchmarkError, match="not valid JSON at line 1"):
        load_benchmark("vlm4d", path, None)


def test_videos_must_be_there_and_inside(tmp_path):
    path = write_rows(tmp_path, [GOOD, GOOD | {"id": "validation_2", "video": "videos_real/../../../secret.mp4"}])
    with pytest.raises(BenchmarkError) as caught:
        load_benchmark("vlm4d", path, str(tmp_path))
    assert "there is no video" in str(caught.value) and "leaves the media root" in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "x/" * 3000])
def test_a_name_that_no_file_can_have(tmp_path, name):
    path = write_rows(tmp_path, [GOOD | {"video": f"videos_real/{name}"}])
    with pytest.raises(BenchmarkError, match="there is no video"):
        load_benchmark("vlm4d", path, str(tmp_path))
    with pytest.raises(BenchmarkError, match="no such file"):
        question_files(tmp_path / name)


def test_an_unknown_benchmark(tmp_path):
    with pytest.raises(BenchmarkError, match="vlm4d, mllm4d, jsonl"):
        load_benchmark("vlm", write_rows(tmp_path, []), None)


def test_a_broken_question_is_named_by_place_and_id(tmp_path):
    path = write_rows(tmp_path, [GOOD | {"id": "validation_7"}, GOOD | {"answer": "B"}])
    with pytest.raises(BenchmarkError) as caught:
        load_benchmark("vlm4d", path, None)
    assert "questions.json#1 (id 'validation_1'): 'answer' is 'B'" in str(caught.value)
    assert "1 of 2 questions are unusable" in str(caught.value)
