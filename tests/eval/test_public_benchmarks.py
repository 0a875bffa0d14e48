"""Public benchmarks from their files to the tables: read, asked, scored by their own rules, rescored."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs import eval as eval_config
from mllm4d_jax.eval.asking import Manner
from mllm4d_jax.eval.evaluate import run
from mllm4d_jax.eval.predictions import Prediction, PredictionError, read_any
from mllm4d_jax.eval.questions import BenchmarkError, load_benchmark
from mllm4d_jax.eval.scoring import results
from mllm4d_jax.eval.statistics import Bootstrap
from mllm4d_jax.qa.benchmarks import PARSERS
from tests.eval.public_benchmarks import (
    VSI_KINDS,
    dsr_row,
    mmsi_entry,
    sti_row,
    vsi_row,
    write_parquet,
    write_tsv,
)
from tests.eval.question_fixtures import write_rows

FEW = Bootstrap(200, 1)
# (kind, truth, response): numbers worth 1.0, 0.6, 0, 0.1; letters right, wrong and right by the strict rules only
ANSWERS = (
    ("object_counting", "4", "4"),
    ("object_counting", "4", "3"),
    ("object_counting", "4", "four"),
    ("object_abs_distance", "2.0", "1.0 m"),
    ("object_rel_distance", "A", "a."),
    ("object_rel_distance", "A", "B. table"),
    ("object_rel_distance", "C", "The answer is C."),
    ("object_rel_direction_easy", "A", "A"),
    ("object_rel_direction_easy", "B", "B"),
    ("object_rel_direction_easy", "B", "B"),
    ("object_rel_direction_medium", "A", "B"),
    ("object_rel_direction_hard", "B", "B"),
    ("object_rel_direction_hard", "A", ""),
)


def vsi_rows():
    return [
        vsi_row(n, kind, truth, scene=f"scene{n // 2}", response=response)
        for n, (kind, truth, response) in enumerate(ANSWERS)
    ]


def answered(rows=None):
    rows = rows or vsi_rows()
    parsed = [(PARSERS["vsi"](row, "test", f"x#{n}", None), row["response"]) for n, row in enumerate(rows)]
    return [Prediction.of(one, text, prompt_mode="published", config="published") for one, text in parsed]


def by_the_published_program(rows):
    """Task -> score and the overall one, written down from the published rule: f64, independent of the project."""

    def value(row):
        word, truth = row["response"].split(" ")[0].rstrip(".").strip(), row["ground_truth"]
        if row["options"] is not None:
            return float(word.lower() == truth.lower())
        try:
            missed = abs(float(word) - float(truth)) / float(truth)
        except ValueError:
            return 0.0
        return float(np.mean([missed <= 1 - t for t in np.linspace(0.5, 0.95, 10)]))

    kinds = {}
    for row in rows:
        kinds.setdefault(row["question_type"], []).append(value(row))
    found = {kind: float(np.mean(values)) for kind, values in kinds.items()}
    levels = [found.pop(f"object_rel_direction_{level}") for level in ("easy", "medium", "hard")]
    found["object_rel_direction"] = sum(levels) / 3
    return found, sum(found.values()) / len(found)


def test_vsi_scores_are_those_of_the_published_program():
    tasks, overall = by_the_published_program(vsi_rows())
    # By hand: counting (1 + .6 + 0) / 3, distance .1, relative distance 1 / 3, direction (1 + 0 + 1 / 2) / 3.
    by_hand = {"object_counting": 1.6 / 3, "object_abs_distance": 0.1, "object_rel_distance": 1 / 3}
    assert tasks == pytest.approx(by_hand | {"object_rel_direction": 0.5}, abs=1e-12)
    found = results(answered(), extractor="official", bootstrap=FEW)
    assert found["macro"]["accuracy"] == pytest.approx(overall, abs=1e-9) and found["macro"]["subtasks"] == 4
    assert found["macro"]["low"] < overall < found["macro"]["high"]
    named = {group["name"]: group for group in found["groups"] if group["table"] == "subtask"}
    assert {name: group["accuracy"] for name, group in named.items()} == pytest.approx(tasks, abs=1e-9)
    assert named["object_counting"]["correct"] == 1 and named["object_counting"]["unparsed"] == 1
    kinds = {group["name"] for group in found["groups"] if group["table"] == "category"}
    assert kinds == set(VSI_KINDS)


def test_both_extractors_stand_beside_each_other():
    rows = results(answered(), bootstrap=FEW)["extractors"]
    strict, official = rows
    assert (strict["extractor"], strict["unparsed"], official["unparsed"]) == ("strict", 2, 3)
    assert strict["macro"] > official["macro"] and set(strict["differ_ids"]) == {"2", "4", "6"}


def test_frequency_and_chance():
    rows = [vsi_row(n, "object_counting", truth, response="") for n, truth in enumerate(("4", "4", "8"))]
    whole = results(answered(rows), bootstrap=FEW)["groups"][0]
    assert whole["chance"] is None and whole["best_letter"] == pytest.approx((1 + 1 + 0.1) / 3)  # always 4
    whole = results(answered(), bootstrap=FEW)["groups"][0]
    assert whole["best_letter"] is None, "letters and numbers have no best constant in common"


def test_the_macro_mean_of_one_video_is_one_too():
    rows = [row | {"scene_name": "scene0"} for row in vsi_rows()]
    found = results(answered(rows), extractor="official", bootstrap=FEW)["macro"]
    assert found["accuracy"] == pytest.approx(by_the_published_program(rows)[1]) and found["low"] is None


@pytest.mark.parametrize("write", [write_parquet, write_tsv, write_rows])
def test_published_answers_are_scored_in_every_form(tmp_path, capsys, write):
    file = write(tmp_path, vsi_rows())
    config = eval_config.get_config("vsi")
    config.rescore.path, config.bootstrap.samples = str(file), 100
    assert run(config, str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "Mean over 4 subtasks: 36.7" in said and "Published baselines" in said and "62.1" in said
    scored = [json.loads(line) for line in (tmp_path / "out/scored.jsonl").read_text().splitlines()]
    assert [row["score"] for row in scored][:4] == [1.0, 0.6, 0.0, 0.1]
    assert (scored[0]["number"], scored[0]["truth"], scored[0]["letter"]) == (4.0, [], None)
    again = read_any(tmp_path / "out/scored.jsonl", "vsi")
    assert [one.true_number for one in again[:2]] == [4.0, 4.0] and again[4].true_number is None


def test_predictions_with_numbers_are_read_back_and_checked():
    one = answered()[1]
    assert (one.number, one.correct, one.rule) == (3.0, False, "number")
    row = one.to_row()
    assert Prediction.from_row(json.loads(json.dumps(row)), "x") == one
    for wrong in ({"true_number": 0}, {"true_number": None}, {"truth": ["A"]}, {"number": "3"}):
        with pytest.raises(PredictionError, match="x: '"):
            Prediction.from_row(row | wrong, "x")


def test_questions_of_a_hub_file_are_asked_with_the_benchmarks_own_words(tmp_path):
    (tmp_path / "scannet").mkdir()
    (tmp_path / "scannet/scene0.mp4").touch()
    file = write_parquet(tmp_path, [vsi_row(n, kind, "4" if n < 2 else "A") for n, kind in enumerate(VSI_KINDS)])
    items = load_benchmark("vsi", file, str(tmp_path))
    assert len(items) == 6 and {one.media for one in items} == {str(tmp_path / "scannet/scene0.mp4")}

    def asked(mode, blind=False):
        (message,) = Manner(mode, None, blind).record(items[2]).messages
        return message["content"]

    video, text = asked("direct")
    assert video == {"type": "video", "path": items[2].media} and text["text"].endswith("given choices directly.")
    assert asked("st_cot")[1]["text"].endswith("D. door")
    assert asked("direct", blind=True) == [text]
    (tmp_path / "scannet/scene0.mp4").unlink()
    with pytest.raises(BenchmarkError, match="6 of 6 questions are unusable"):
        load_benchmark("vsi", file, str(tmp_path))


def test_a_question_about_several_clips_and_an_image(tmp_path):
    for name in ("videos/clip0.mp4", "videos/clip1.mp4", "ref_images/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    file = write_rows(tmp_path, [mmsi_entry()])
    (one,) = load_benchmark("mmsi_video", file, str(tmp_path))
    (message,) = Manner("direct", None, blind=False).record(one).messages
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "video", "video", "text", "image", "text"]
    assert message["content"][4]["path"] == str(tmp_path / "ref_images/a.jpg")
    (blind,) = load_benchmark("mmsi_video", file, None)
    (message,) = Manner("direct", None, blind=True).record(blind).messages
    assert {part["type"] for part in message["content"]} == {"text"}
    (tmp_path / "ref_images/a.jpg").unlink()
    with pytest.raises(BenchmarkError, match="there is no image .*data.root must be the folder"):
        load_benchmark("mmsi_video", file, str(tmp_path))


def test_broken_rows_of_a_table_are_all_named(tmp_path):
    rows = [vsi_row(0, "object_counting", "4"), vsi_row(1, "object_counting", "-4"), vsi_row(2, "no_kind", "A")]
    with pytest.raises(BenchmarkError, match=r"2 of 3 questions are unusable:\ntest.parquet#1: .*\ntest.parquet#2: "):
        load_benchmark("vsi", write_parquet(tmp_path, rows), None)


@pytest.mark.parametrize(("benchmark", "row"), [("sti", sti_row(1)), ("dsr", dsr_row())])
def test_others_are_read_from_parquet(tmp_path, benchmark, row):
    (one,) = load_benchmark(benchmark, write_parquet(tmp_path, [row]), None)
    assert one.benchmark == benchmark and len(one.truth) == 1
