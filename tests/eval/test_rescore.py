"""The task on predictions that are there: files in, tables out."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import run
from configs import common
from configs.schema import ConfigError
from mllm4d_jax.eval import evaluate
from mllm4d_jax.eval.evaluate import EvaluationError
from mllm4d_jax.eval.evaluate import run as run_task
from mllm4d_jax.eval.predictions import PredictionError, PredictionStore, read_any
from mllm4d_jax.files import jsonl
from mllm4d_jax.files.lock import LockError, WriterLock
from mllm4d_jax.parallel.multihost import FirstProcessError
from mllm4d_jax.qa.benchmarks import PARSERS
from tests.eval.question_fixtures import prediction, vlm4d_rows
from tests.report.reading import read

FAST = "--config.bootstrap.samples=200"
PUBLISHED = os.environ.get("MLLM4D_VLM4D_PREDICTIONS", "")


def published(folder):
    rows = vlm4d_rows()
    folder.mkdir()
    (folder / "real.json").write_text(json.dumps(rows[:6]), encoding="utf-8")
    (folder / "synthetic.json").write_text(json.dumps(rows[6:]), encoding="utf-8")
    return folder


def groups(workdir):
    found = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    return {(row["table"], row["name"]): row for row in found["groups"]}, found


def test_published_files(tmp_path, capsys):
    path = published(tmp_path / "published")
    argv = ["run.py", "--config=configs/eval.py:rescore", f"--config.rescore.path={path}", f"--workdir={tmp_path}/out"]
    assert run.main([*argv, FAST]) == 0
    rows, found = groups(tmp_path / "out")
    assert (rows["split", "real"]["correct"], rows["split", "real"]["n"]) == (4, 6)
    assert (rows["split", "synthetic"]["correct"], rows["split", "synthetic"]["n"]) == (1, 2)
    assert rows["split", "real"]["unparsed"] == 1 and rows["split", "synthetic"]["unparsed"] == 0
    assert rows["category", "real: egocentric"]["n"] == 1 and rows["subtask", "real: numeric"]["n"] == 1
    assert rows["category", "synthetic: false positive"]["correct"] == 0
    assert [row["correct_with_blanks"] for row in found["extractors"] if row["split"] == "real"] == [5, 5]
    said = capsys.readouterr().out
    assert said.startswith("# Results: vlm4d") and "(819 of 1371)" in said
    assert said.startswith((tmp_path / "out" / "results.md").read_text(encoding="utf-8"))
    page = read((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    outcomes = [json.loads(card.attributes["data-facets"])["outcome"] for card in page.all("article")]
    assert sorted(outcomes) == ["correct"] * 5 + ["unparsed"] + ["wrong"] * 2
    assert "The completion is empty." in page.text and "Both extractors" in page.text


@pytest.mark.parametrize("extractor", ["strict", "official"])
def test_a_run_with_controls_and_comparison(tmp_path, extractor):
    for name, control, response in (("main", "", "A."), ("blind", "blind", "B"), ("other", "", "C")):
        with PredictionStore(tmp_path / name, name) as store:
            made = [prediction(f"q{n}", response, control=control, config=name, video=f"v{n}") for n in range(6)]
            store.append(made)
    config = common.config("eval")
    config.rescore.path = str(tmp_path / "main")
    config.controls = (str(tmp_path / "blind"),)
    config.compare = str(tmp_path / "other" / "predictions.jsonl")
    config.extractor, config.bootstrap.samples = extractor, 200
    assert run_task(config, str(tmp_path / "main")) == 0
    rows, found = groups(tmp_path / "main")
    assert rows["all", "all"]["correct"] == (6 if extractor == "strict" else 0)
    assert rows["all", "all"]["controls"] == [{"control": "blind", "n": 6, "accuracy": 0.0}]
    assert found["comparison"]["rows"][0]["only_second"] == (6 if extractor == "strict" else 0)
    assert found["configs"] == ["main"] and found["comparison"]["configs"] == ["other"]


def test_what_runs_could_not_ask_is_said_of_all_of_them(tmp_path, capsys):
    """It was 0 for a run whose list named two, and nothing was said of the runs beside it."""
    bad = {"main": ((0, 0, 6), (1, 0, 7), (1, 0, 7)), "blind": (), "other": ((0, 0, 8),)}  # host, source, index
    for name, control in (("main", ""), ("blind", "blind"), ("other", "")):
        with PredictionStore(tmp_path / name, name) as store:
            store.append([prediction(f"q{n}", "A.", control=control, config=name) for n in range(6)])
        for host, source, index in bad[name]:
            jsonl.append(
                jsonl.of_host(tmp_path / name / "quarantine.jsonl", host), [{"source": source, "index": index}]
            )
    config = common.config("eval")
    config.bootstrap.samples, config.rescore.path = 200, str(tmp_path / "main")
    config.controls = (str(tmp_path / "blind"), str(tmp_path / "blind/predictions.jsonl"))
    config.compare = str(tmp_path / "other")
    assert run_task(config, str(tmp_path / "out")) == 0
    _, found = groups(tmp_path / "out")
    assert (found["unusable"], found["comparison"]["unusable_in_first"]) == (2, 1)
    assert [one["unusable"] for one in found["controls"]] == [0, None]
    said = capsys.readouterr().out
    assert ". 2 more could not be asked and are in no figure" in said and "in the first 1 could not be asked)." in said
    assert said.count("In the blind control it is not known how many could not be asked.") == 1
    config.rescore.path, config.controls, config.compare = str(tmp_path / "main/predictions.jsonl"), (), ""
    assert run_task(config, str(tmp_path / "out")) == 0
    assert groups(tmp_path / "out")[1]["unusable"] is None
    assert "How many more could not be asked is not known." in capsys.readouterr().out


def test_the_first_process_alone_reads_what_all_have_written(tmp_path, monkeypatch):
    """Another one's copy of a folder in a bucket has none of the files of the others, and may have no answer at all."""
    config = common.config("eval", {"model.path": "model"})
    monkeypatch.setattr(evaluate, "_ask_all", lambda config, folder: 0)
    monkeypatch.setattr(evaluate.multihost, "is_primary", lambda: False)
    for failed in (False, True):  # the first process, at scoring
        # [failed, unusable] of `_agree`, then [failed] of `primary_only`
        told = lambda row, failed=failed: np.array([[failed and len(row) == 1, 0][: len(row)]])  # noqa: E731
        monkeypatch.setattr(evaluate.multihost, "gather", told)
        if failed:
            with pytest.raises(FirstProcessError, match="its own output says why"):
                run_task(config, str(tmp_path))
        else:
            assert run_task(config, str(tmp_path)) == 0
    assert not list(tmp_path.iterdir())


def test_published_files_may_have_any_name(tmp_path):
    rows = vlm4d_rows()
    (tmp_path / "predictions_gpt.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert len(read_any(tmp_path, "vlm4d")) == len(rows)


def test_files_of_several_hosts_are_one_run(tmp_path):
    for host in range(2):
        with PredictionStore(tmp_path, "c0", host=host) as store:
            store.append([prediction(f"q{host}")])
    assert [one.id for one in read_any(tmp_path, "jsonl")] == ["q0", "q1"]
    assert [one.id for one in read_any(tmp_path / "predictions.jsonl", "jsonl")] == ["q0"]


def test_what_cannot_be_scored(tmp_path):
    with pytest.raises(PredictionError, match="no such file"):
        read_any(tmp_path / "nothing", "vlm4d")
    rows = vlm4d_rows()
    del rows[1]["response"]
    path = tmp_path / "asked.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(PredictionError, match="1 questions have no text 'response', the first are real/validation_2"):
        read_any(path, "vlm4d")


def test_problems_end_with_exit_code_1(tmp_path, capsys):
    argv = ["run.py", "--config=configs/eval.py", f"--workdir={tmp_path}"]
    assert run.main([*argv, f"--config.rescore.path={tmp_path / 'nothing.json'}"]) == 1
    assert "nothing.json: no such file" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text('[{"id": "validation_1"}]', encoding="utf-8")
    assert run.main([*argv, f"--config.rescore.path={broken}"]) == 1
    assert "broken.json#0 (id 'validation_1')" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_nothing_to_score_is_said():
    with pytest.raises(EvaluationError, match="rescore.path"):
        run_task(common.config("eval"), "unused")


def test_variants():
    from configs import eval as module

    benchmarks = {variant: module.get_config(variant).benchmark for variant in module.get_config.variants}
    assert benchmarks == {name: name for name in PARSERS} | {
        **{"": "vlm4d", "rescore": "vlm4d"},
        **{"quickstart": "mllm4d", "quickstart_reasoning": "mllm4d"},
    }
    with pytest.raises(ConfigError, match="did you mean 'configs/eval.py:rescore'"):
        module.get_config("rescor")


@pytest.mark.skipif(not PUBLISHED, reason="MLLM4D_VLM4D_PREDICTIONS does not name the folder of published predictions")
@pytest.mark.parametrize("extractor", ["strict", "official"])
def test_the_published_predictions_of_the_fine_tuned_model(tmp_path, extractor):
    config = common.config("eval")
    config.rescore.path, config.extractor, config.bootstrap.samples = PUBLISHED, extractor, 200
    assert run_task(config, str(tmp_path)) == 0
    rows, found = groups(tmp_path)
    real, synthetic = rows["split", "real"], rows["split", "synthetic"]
    assert (real["correct"], real["n"], real["unparsed"]) == (804, 1371, 15)
    assert (synthetic["correct"], synthetic["n"], synthetic["unparsed"]) == (238, 445, 0)
    assert (real["clusters"], synthetic["clusters"]) == (600, 400)
    names = ("real: exocentric", "real: egocentric", "synthetic: directional", "synthetic: false positive")
    assert [rows["category", name]["n"] for name in names] == [922, 449, 400, 45]
    assert rows["subtask", "real: numeric"]["n"] == 232
    assert [row["correct_with_blanks"] for row in found["extractors"]] == [819, 819, 238, 238]


def test_one_evaluation_at_a_time_in_a_workdir(tmp_path):
    path = published(tmp_path / "published")
    config = common.config("eval")
    config.rescore.path = str(path)
    (tmp_path / "out").mkdir()
    with WriterLock.of(tmp_path / "out"), pytest.raises(LockError, match="another run is writing to"):
        run_task(config, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
