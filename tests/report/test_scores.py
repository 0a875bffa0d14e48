"""Evaluation tables: counted from predictions, or read out of results.json."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mllm4d_jax.report import compare, scores, summary
from mllm4d_jax.report.reading import PredictionPlace, Run, read_run
from tests.report.reading import read
from tests.report.workdirs import predictions, write_eval, write_lines

CLIPS = [("a.mp4", "Which?", letter) for letter in "ABCD" * 15]
RESULTS = {
    "groups": [
        {"table": "all", "name": "all", "n": 10, "accuracy": 0.5, "chance": 0.25},
        {"table": "split", "name": "real", "n": 4, "accuracy": 0.25, "chance": 0.25},
        {"table": "split", "name": "odd", "n": 4, "accuracy": math.inf, "chance": "x"},
    ],
    "summary": "10 questions",
    "tables": [
        {"title": "By split", "note": "a note", "heads": ["", "n", "accuracy %"], "rows": [["real", "4", "25.0 [1, 2]"],
         ["odd", "4", "–"], ["too short"], 3]},
        {"title": "no rows", "heads": ["a"], "rows": []}, 7, {"heads": 3, "rows": [[]]},
    ],
}  # fmt: skip


def cells(markup) -> list[list[str]]:
    return [[cell.text for cell in row.all("td")] for row in read(markup).all("tbody")[0].all("tr")]


def test_counts_are_those_of_a_plain_loop(tmp_path):
    rows = predictions(CLIPS)
    write_lines(tmp_path / "predictions.jsonl", rows)
    found = {c.key: c for c in scores.counts(read_run(tmp_path).predictions)}
    wanted = {("vlm4d real", "all", ""), ("vlm4d real", "category", "exo"), ("vlm4d synthetic", "subtask", "distance")}
    assert wanted <= found.keys()
    for (group, part, name), count in found.items():
        split = group.split(" ")[1]
        mine = [r for r in rows if r["split"] == split and (part == "all" or r[part] == name)]
        assert count.n == len(mine) > 0
        assert count.correct == sum(bool(r["letter"]) and r["correct"] for r in mine)
        assert count.unparsed == sum(not r["letter"] for r in mine)
        assert count.conflicts == sum(r["conflict"] for r in mine)
    assert sum(c.n for c in found.values() if c.key[1] == "all") == len(rows)
    assert sum(c.n for c in found.values() if c.key[1] == "category") == sum(bool(r["category"]) for r in rows)


def test_tables_of_results_are_shown_and_sorted_by_their_figures():
    root = read(scores.result_tables(RESULTS))
    assert (
        [e.text for e in root.all("caption")] == ["By split"] and "10 questions" in root.text and "a note" in root.text
    )
    assert [e.text for e in root.all("th")] == ["group", "n", "accuracy %"]
    assert cells(scores.result_tables(RESULTS)) == [["real", "4", "25.0 [1, 2]"], ["odd", "4", "–"]]
    assert [e.attributes["data-sort"] for e in root.all("td") if "data-sort" in e.attributes] == ["4", "25", "4", ""]
    (chart,) = root.all("figure")
    assert chart.all("figcaption")[0].text == "Accuracy by split" and "25%" in chart.text


@pytest.mark.parametrize(
    "results", [[], {}, 3, "text", [[1, 2], "a"], {"tables": [[], {}]}, {"tables": [], "groups": 3}]
)
def test_results_of_any_shape_can_be_shown(results):
    read(scores.result_tables(results))


def test_deep_results_end_somewhere():
    deep: dict = {}
    for _ in range(60):
        deep = {"a": deep, "b": 1}
    assert "b" in read(scores.result_tables(deep)).text


def test_a_response_without_a_letter_lowers_the_accuracy():
    places = [PredictionPlace((Path("x"), n), str(n), "", "", "", "", outcome, False)
              for n, outcome in enumerate(["correct", "unparsed", "wrong", "correct"])]  # fmt: skip
    assert summary.accuracy(places) == 0.5
    (count,) = scores.counts(places)
    assert (count.key[0], count.accuracy, count.unparsed) == ("predictions", 0.5, 1)


def pair(tmp_path, results: bool) -> dict[str, Run]:
    runs = {}
    for name, seed in (("a", 0), ("b", 1)):
        folder = write_eval(tmp_path / name, seed=seed, clips=3)
        if results:
            (folder / "results.json").write_text(
                '{"groups": [{"table": "all", "name": "all", "n": 4, "accuracy": %s}]}' % (0.25 * (seed + 1))
            )
        runs[name] = read_run(folder)
    return runs


def test_accuracies_stand_in_columns_with_their_difference(tmp_path):
    (row,) = cells(compare.accuracy_columns(pair(tmp_path, results=True)))
    assert row == ["all", "all", "4", "4", "25.0%", "50.0%", "+25.0 points"]


def test_without_results_the_predictions_are_counted(tmp_path):
    runs = pair(tmp_path, results=False)
    first, second = (scores.counts(run.predictions)[0] for run in runs.values())
    row = cells(compare.accuracy_columns(runs))[0]
    change = 100 * (second.accuracy - first.accuracy)
    assert row[:5] == ["vlm4d real", "all", "", "6", "6"] and row[-1] == f"{change:+.1f} points"


def test_questions_of_both_runs_are_crossed(tmp_path):
    runs = pair(tmp_path, results=False)
    first, second = (run.predictions for run in runs.values())
    found = compare.crossed(first, second[1:])
    assert sum(map(len, found.values())) == len(first) - 1
    mine, others = {p.place: p for p in first}, {p.place: p for p in second}
    for outcomes, places in found.items():
        for a, b in places:
            assert mine[a].id == others[b].id and (mine[a].outcome, others[b].outcome) == outcomes
    differing = compare.differing(found)
    assert differing and all((mine[a].outcome == "correct") != (others[b].outcome == "correct") for a, b in differing)


def test_only_differing_keys_of_the_configs_are_listed(tmp_path):
    rows = cells(compare.config_columns(pair(tmp_path, results=False)))
    assert rows == [["model.path", "weights/0", "weights/1"], ["seed", "0", "1"]]


def test_runs_are_named_by_as_much_of_their_paths_as_it_takes(tmp_path):
    for name in ("x/sft", "y/sft"):
        write_eval(tmp_path / name, clips=1)
    first, second = (read_run(tmp_path / name) for name in ("x/sft", "y/sft"))
    assert compare.labels(first, second) == ("x/sft", "y/sft")
    assert len(set(compare.labels(first, first))) == 2
