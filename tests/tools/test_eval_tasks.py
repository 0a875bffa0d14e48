"""Task files for lmms-eval and VLMEvalKit: they give the figures of this project's own scorer."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from mllm4d_jax.eval.predictions import Prediction
from mllm4d_jax.eval.questions import BenchmarkError, load_benchmark
from mllm4d_jax.eval.scoring import results
from mllm4d_jax.eval.statistics import Bootstrap
from tests.eval.question_fixtures import vlm4d_rows, write_rows
from tests.qa.test_benchmarks import ROW
from tools import eval_tasks

SAID = (
    "A",
    "(B)",
    "B. right",
    "<answer>up</answer>",
    "The answer is not moving",
    "it depends",
    "",
    "<think>A</think>C",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with the files of eight questions, in two splits."""
    folder = tmp_path_factory.mktemp("tasks")
    for row in vlm4d_rows():
        place = folder / "videos" / row["video"][row["video"].replace("\\", "/").index("videos_") :].replace("\\", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    file = write_rows(folder, vlm4d_rows())
    assert eval_tasks.write_tasks("vlm4d", str(file), str(folder / "videos"), folder / "out") == "vlm4d_strict"
    return folder


def ours(folder):
    """The figures of this project for `SAID`: all, and per split."""
    asked = load_benchmark("vlm4d", folder / "questions.json", None)
    pairs = zip(asked, SAID, strict=True)
    answered = [Prediction.of(one, text, prompt_mode="published", config="x") for one, text in pairs]
    groups = results(answered, bootstrap=Bootstrap(100))["groups"]
    found = {f"accuracy_{g['name']}": g["accuracy"] for g in groups if g["table"] == "split"}
    return found | {"accuracy": groups[0]["accuracy"], "unparsed": groups[0]["unparsed"] / len(SAID)}


def loaded(path):
    """A file as lmms-eval loads it: run, and in no table of modules."""
    spec = importlib.util.spec_from_file_location("utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def aggregated(docs, process, mean):
    values = {}
    for doc, text in zip(docs, SAID, strict=True):
        for metric, value in process(doc, [text]).items():
            values.setdefault(metric, []).append(value)
    return {metric: mean(found) for metric, found in values.items()}


def test_the_rules_that_are_handed_out_give_our_figures(made):
    task = loaded(made / "out/lmms_eval/utils.py")
    docs = [json.loads(line) for line in (made / "out/lmms_eval/vlm4d_strict.jsonl").read_text().splitlines()]
    found = aggregated(docs, task.process_results, lambda values: sum(values) / len(values))
    assert found == pytest.approx(ours(made)) and 0 < found["accuracy"] < 1 and found["unparsed"] == 3 / 8
    assert docs[0]["video"] == str(made / "videos/videos_real/davis/bus.mp4") == task.doc_to_visual(docs[0])[0]
    (message,) = task.doc_to_messages(docs[0])
    assert message["content"][0] == {"type": "video", "url": docs[0]["video"]}
    assert task.doc_to_text(docs[0]) == message["content"][1]["text"]
    assert message["content"][1]["text"].endswith("D. not moving\nAnswer with the letter of the correct option.")
    assert "mllm4d_jax." not in (made / "out/lmms_eval/utils.py").read_text()
    assert task.mean_over_subtasks([["a", 1.0], ["a", 0.0], ["b", 1.0]]) == 0.75


def test_the_mean_over_subtasks_is_asked_for_where_it_is_the_headline(tmp_path):
    (tmp_path / "videos/clips").mkdir(parents=True)
    (tmp_path / "videos/clips/a.mp4").touch()
    file = write_rows(tmp_path, [ROW])
    eval_tasks.write_tasks("mllm4d", str(file), str(tmp_path / "videos"), tmp_path / "out")
    text = (tmp_path / "out/lmms_eval/mllm4d_strict.yaml").read_text()
    assert "metric: mean_over_subtasks\n    aggregation: !function utils.mean_over_subtasks" in text
    assert "accuracy_" not in text, "one split has no figure of its own"


def test_names_that_two_files_define_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text('"""A."""\n_X = 1\n')
    (tmp_path / "b.py").write_text('"""B."""\n\n\ndef _X():\n    pass\n')
    monkeypatch.setattr(eval_tasks, "ROOT", tmp_path)
    with pytest.raises(eval_tasks.TaskFileError, match="b.py and a.py both define _X"):
        eval_tasks.bundled(["a.py", "b.py"])


def test_what_cannot_be_asked_is_said(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").touch()
    part = write_rows(tmp_path, [ROW | {"video_end": 2}])
    with pytest.raises(eval_tasks.TaskFileError, match="1 questions are about a part of a video"):
        eval_tasks.write_tasks("mllm4d", str(part), str(tmp_path), tmp_path / "out")
    with pytest.raises(BenchmarkError, match="there is no video"):
        eval_tasks.write_tasks("mllm4d", str(part), str(tmp_path / "clips"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_where_the_folder_should_be_is_named(made, tmp_path, capsys, out):
    (tmp_path / "file").touch()
    asked = dict(benchmark="vlm4d", data=made / "questions.json", videos=made / "videos", out=tmp_path / out)
    assert eval_tasks.main([f"--{name}={value}" for name, value in asked.items()]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/file") and "(a file is where a folder should be)" in said


@pytest.mark.slow
def test_lmms_eval_itself(made):
    pytest.importorskip("lmms_eval")
    tasks = pytest.importorskip("lmms_eval.tasks")
    manager = tasks.TaskManager("WARNING", include_path=str(made / "out/lmms_eval"), include_defaults=False)
    task = tasks.get_task_dict(["vlm4d_strict"], manager, "chat")["vlm4d_strict"]
    found = aggregated(task.test_docs(), task.process_results, lambda values: sum(values) / len(values))
    assert found == pytest.approx(ours(made)) and set(found) <= set(task.aggregation())


@pytest.mark.slow
def test_vlmevalkit_itself(made):
    pytest.importorskip("vlmeval.dataset")
    import pandas

    code = "import sys; sys.path.insert(0, sys.argv[1]); import strict_video_mcq as m; m.register()\n"
    code += (
        "from vlmeval.dataset import build_dataset\nd = build_dataset('vlm4d_strict')\nprint(d.evaluate(sys.argv[2]))"
    )
    file = made / "answers.tsv"
    pandas.DataFrame({"index": range(8), "prediction": SAID}).to_csv(file, sep="\t", index=False)
    done = subprocess.run(
        [sys.executable, "-c", code, str(made / "out/vlmevalkit"), str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = ours(made)
    assert f"'Overall': {100 * expected['accuracy']:.4g}" in done.stdout
