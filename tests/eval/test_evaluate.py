"""Asking a model: what is asked, that nothing is lost or asked twice, and that company changes no answer."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from configs import common
from configs import sft as sft_config
from data_prep.sample import write_sample_world
from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.eval import evaluate
from mllm4d_jax.eval.asking import ItemSource, Layout, Manner, ShuffledEncoder
from mllm4d_jax.eval.evaluate import EvaluationError
from mllm4d_jax.eval.predictions import PredictionError, read_predictions
from mllm4d_jax.export import task as export
from mllm4d_jax.run.clips import CLIPS, ClipsError
from mllm4d_jax.run.start import StartError, choose_model
from mllm4d_jax.run.tiny import write_tiny_model
from mllm4d_jax.sft import task as sft
from tests.eval.question_fixtures import item
from tests.processes import Processes, write_config

FRAMES = 4


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with model/, world/ (3 clips with 4 questions each) and asked.jsonl, whose last question has no clip."""
    folder = tmp_path_factory.mktemp("asked")
    records = write_sample_world(folder / "world", seed=0, clips=3)
    write_tiny_model(folder / "model", [records.read_text()], seed=0)
    rows = [json.loads(line) for line in (folder / "world/r1.jsonl").read_text().splitlines()]
    rows = [{name: row[name] for name in ("messages", "videos", "solution")} for row in rows]  # as released: no ids
    (folder / "world/videos/broken.mp4").write_bytes(b"no video")
    rows.append(rows[0] | {"videos": ["videos/broken.mp4"]})
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_config(folder, **values):
    """A quick evaluation of the tiny model; keys with `__` for dots."""
    chosen = {
        "benchmark": "jsonl",
        "model.path": str(folder / "model"),
        "model.dtype": "float32",
        "data.path": str(folder / "asked.jsonl"),
        "data.root": str(folder / "world"),
        "data.prefix_buckets": (128,),
        "data.branch_buckets": (192,),
        "video.num_frames": FRAMES,
        "max_new_tokens": 6,
        "bootstrap.samples": 100,
    }
    return common.config("eval", chosen | {name.replace("__", "."): v for name, v in values.items()})


def answers(workdir):
    return {one.id: (one.response, one.tokens, one.finish, one.letter) for one in read_predictions(workdir)}


@pytest.fixture(scope="session")
def asked(world, tmp_path_factory):
    """Workdir of a finished run, 4 questions to a row."""
    workdir = tmp_path_factory.mktemp("runs") / "together"
    assert evaluate.run(make_config(world), str(workdir)) == 0
    return workdir


def test_a_run_answers_every_question_and_says_what_it_could_not_ask(asked, capsys):
    found = answers(asked)
    assert set(found) == {f"asked.jsonl#{i}" for i in range(12)}
    assert len({response for response, *_ in found.values()}) > 3  # the model does not say one thing to all
    entry = json.loads((asked / "quarantine.jsonl").read_text())
    assert (entry["key"], entry["index"]) == ("asked.jsonl#12", 12)
    results = json.loads((asked / "results.json").read_text())
    assert results["unusable"] == 1 and results["groups"][0]["n"] == 12
    assert "1 more could not be asked" in (asked / "results.md").read_text()
    assert json.loads((asked / "config.json").read_text())["benchmark"] == "jsonl"


def test_a_finished_run_asks_nothing_again(asked, world, tmp_path, monkeypatch):
    workdir = tmp_path / "copy"
    shutil.copytree(asked, workdir)
    monkeypatch.setattr(evaluate, "load_chosen", None)  # would be called
    before = (workdir / "predictions.jsonl").read_bytes()
    assert evaluate.run(make_config(world, questions_per_video=2, prompts_at_once=1), str(workdir)) == 0
    assert (workdir / "predictions.jsonl").read_bytes() == before
    with pytest.raises(PredictionError, match="made with another configuration"):
        evaluate.run(make_config(world, temperature=0.5), str(workdir))


def test_one_question_at_a_time_gives_the_same_answers(asked, world, tmp_path):
    """What a killed run left of a line is asked again, what is there is kept."""
    kept = (asked / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    workdir = tmp_path / "one"
    workdir.mkdir()
    (workdir / "predictions.jsonl").write_bytes(kept[0] + kept[5][:40])
    assert evaluate.run(make_config(world, questions_per_video=1), str(workdir)) == 0
    assert answers(workdir) == answers(asked)
    lines = (workdir / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[0] == kept[0] and len(lines) == 12


def test_a_response_goes_on_from_the_beginning_that_is_given(asked, world, tmp_path):
    begun = "<answer>"
    assert evaluate.run(make_config(world, prompt__gen_prefix=begun), str(tmp_path / "begun")) == 0
    found, plain = answers(tmp_path / "begun"), answers(asked)
    assert found.keys() == plain.keys() and all(response.startswith(begun) for response, *_ in found.values())
    assert all(tokens <= 6 for _, tokens, *_ in found.values())  # what was given is not generated
    assert all(found[name][0] != begun + plain[name][0] for name in found)  # it is read, not put in front
    # The model is shown what training shows it before the rest of such an answer.
    encoder, _ = encoders(world)
    encoder.gen_prefix = begun
    with encoder:
        record = Manner("direct", None, blind=True).record(item(prompt="Which?"))
        asked_for = encoder.encode(record, add_generation_prompt=True)
        turns = (*record.messages, {"role": "assistant", "content": begun})
        trained = encoder.encode(dataclasses.replace(record, messages=turns))
    np.testing.assert_array_equal(asked_for.tokens, trained.tokens[: len(asked_for.tokens)])
    assert len(trained.tokens) - len(asked_for.tokens) == 2 and not asked_for.supervised.any()  # <|im_end|>, newline


def encoders(folder):
    of = (ProcessorConfig.from_folder(folder / "model"), Tokenizer.from_folder(folder / "model"))
    options = VideoOptions(num_frames=FRAMES)
    return Encoder(*of, options), ShuffledEncoder(*of, options, seed=0)


def frames_of(example):
    """f32[frames, ...] of a clip's patches, undone from pairs of frames."""
    grid = example.grids[0]
    pairs = example.patches.reshape(grid.t, grid.h * grid.w, 3, 2, -1)
    return pairs.transpose(0, 3, 1, 2, 4).reshape(2 * grid.t, -1)


def test_controls_change_what_the_model_sees_and_nothing_else(world):
    asked = item(prompt="<video>\nWhich?", media=str(world / "world/videos/clip_000.mp4"))
    plain, shuffled = encoders(world)
    with plain, shuffled:
        record = Manner("direct", None, blind=False).record(asked)
        true, mixed, again = (e.encode(record, add_generation_prompt=True) for e in (plain, shuffled, shuffled))
        blind = plain.encode(Manner("direct", None, blind=True).record(asked), add_generation_prompt=True)
    a, b = frames_of(true), frames_of(mixed)
    assert not np.array_equal(a, b) and np.array_equal(b, frames_of(again))
    assert sorted(x.tobytes() for x in a) == sorted(x.tobytes() for x in b)
    assert (true.text, true.timestamps, true.key) == (mixed.text, mixed.timestamps, mixed.key)
    np.testing.assert_array_equal(true.positions, mixed.positions)
    assert blind.grids == () and "Which?" in blind.text and "vision" not in blind.text and "vision" in true.text


def test_rows_hold_nearly_equally_many_questions(world):
    source = ItemSource([item(f"q{i}", prompt=f"{i}?") for i in range(9)], Manner("direct", None, blind=True))
    plain, _ = encoders(world)
    examples = [plain.encode(source[i], add_generation_prompt=True) for i in range(9)]
    layout = Layout(2, 8, SimpleNamespace(visual_token_ids=(1, 2)))
    assert [[e.key for e in g.examples] for g in layout.groups(examples)] == [
        ["q0", "q1", "q2", "q3"],
        ["q4", "q5", "q6", "q7", "q8"],
    ]
    with pytest.raises(ValueError, match="3 groups for 2 rows"):
        layout.collate([None] * 3)


def test_the_hash_is_of_what_answers_depend_on(world, tmp_path):
    def digest(**values):
        config = make_config(world, **values)
        choice = choose_model(config.model.path, config.model.adapter, config.model.step)
        return evaluate.answers_hash(config, evaluate.manner_of(config), choice)

    first = digest()
    assert digest(questions_per_video=3, prompts_at_once=1, limit=2, data__workers=1, mesh__data=2) == first
    shutil.copytree(world / "model", tmp_path / "model")
    shutil.copy(world / "asked.jsonl", tmp_path)
    moved = dict(model__path=str(tmp_path / "model"), data__path=str(tmp_path / "asked.jsonl"))
    assert digest(**moved) == first
    (tmp_path / "asked.jsonl").write_text((world / "asked.jsonl").read_text().replace("camera", "viewer"))
    assert digest(**moved) != first
    for change in (dict(seed=1), dict(control="blind"), dict(prompt__mode="st_cot"), dict(video__num_frames=8)):
        assert digest(**change) != first


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (dict(data__path=""), EvaluationError, "data.path is empty"),
        (dict(data__root=""), EvaluationError, "data.root is empty"),
        (dict(model__path="nowhere"), StartError, "model.path = 'nowhere' is not a model folder"),
        (dict(model__adapter="nowhere"), StartError, "model.adapter = nowhere holds no checkpoint and no PEFT"),
        (dict(model__step=3), StartError, "model.step = 3 without model.adapter"),
    ],
)
def test_what_cannot_be_run_is_said(world, tmp_path, values, error, message):
    with pytest.raises(error, match=message):
        evaluate.run(make_config(world, **values), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_process_that_fails_stops_the_others(world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_ask_all", lambda config, folder: 0)
    monkeypatch.setattr(evaluate.multihost, "gather", lambda numbers: np.array([numbers, [1, 0]]))
    with pytest.raises(EvaluationError, match="process 1 of this run could not go on"):
        evaluate.run(make_config(world), str(tmp_path))


def test_the_others_are_told_of_a_failure_once(world, tmp_path, monkeypatch):
    """However early or late it comes, so that no process waits for a message that nobody sends."""
    sent = []

    def gather(numbers, fail=False):
        sent.append(numbers)
        return np.array([numbers, [int(fail), 0]])

    monkeypatch.setattr(evaluate.multihost, "gather", gather)
    monkeypatch.setattr(evaluate, "load_chosen", None)  # fails when it is called
    with pytest.raises(TypeError):
        evaluate.run(make_config(world), str(tmp_path / "late"))
    assert sent == [[0, 13], [1, 0]]
    sent.clear()
    with pytest.raises(EvaluationError):
        evaluate.run(make_config(world, data__path=""), str(tmp_path / "early"))
    assert sent == [[1, 0]]
    sent.clear()
    monkeypatch.setattr(evaluate.multihost, "gather", lambda numbers: gather(numbers, fail=True))
    with pytest.raises(evaluate.StoppedElsewhereError):
        evaluate.run(make_config(world), str(tmp_path / "elsewhere"))
    assert sent == [[0, 13]]


def test_answers_about_other_videos_are_not_gone_on_with(asked, world, tmp_path):
    """A video was replaced since: its answers in the file are not about it."""
    shutil.copytree(asked, tmp_path / "out")
    path = tmp_path / "out" / CLIPS
    known = json.loads(path.read_text())
    first = next(iter(known))
    path.write_text(json.dumps(known | {first: "5:abc"}))
    with pytest.raises(ClipsError, match=f"not the files that this run began with: {re.escape(first)}"):
        evaluate.run(make_config(world), str(tmp_path / "out"))


def test_a_quarantined_question_is_not_tried_again(asked, world, tmp_path, capsys, monkeypatch):
    shutil.copytree(asked, tmp_path / "out")
    monkeypatch.setattr(Quarantine, "add", None)
    assert evaluate.run(make_config(world), str(tmp_path / "out")) == 0
    assert "1 questions could not be asked" in capsys.readouterr().out


def test_what_could_not_be_asked_otherwise_is_no_reason_not_to_try(asked, world, tmp_path):
    """Twelve questions are too long for a first run; with more room for them they were skipped without being tried."""
    short = make_config(world, data__max_tokens=16)
    with pytest.raises(EvaluationError, match="not one of the 13 questions could be asked: 12 too_long, 1 not_a_"):
        evaluate.run(short, str(tmp_path / "out"))
    with pytest.raises(QuarantineError, match=r"quarantine.jsonl, line 1: made with another configuration .*delete"):
        evaluate.run(make_config(world), str(tmp_path / "out"))
    (found,) = {json.loads(line)["config"] for line in (asked / "quarantine.jsonl").read_text().splitlines()}
    assert found == read_predictions(asked)[0].config


def test_questions_of_which_none_can_be_asked_are_an_error(world, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text((world / "asked.jsonl").read_text().splitlines()[-1])
    for _ in range(2):  # again, without trying it again
        with pytest.raises(EvaluationError, match=r"not one of the 1 questions could be asked: 1 not_a_video\. "):
            evaluate.run(make_config(world, data__path=str(path)), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_bar_leaves_out_what_cannot_be_asked(capsys):
    with evaluate.progress_bar(40) as bar:
        bar.update(10)
        bar.total -= 5
        bar.update(25)
    shown = capsys.readouterr().err
    assert "35/35" in shown and "question/s" in shown


@pytest.mark.parametrize(("terminal", "seconds"), [(False, 30.0), (True, 0.1)])
def test_the_bar_is_quiet_where_there_is_no_terminal(monkeypatch, terminal, seconds):
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", out)
    now = [0.0]
    monkeypatch.setattr(evaluate.tqdm, "monitor_interval", 0)  # no thread, so that time is what this test says
    with evaluate.progress_bar(1000) as bar:
        bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0
        assert bar.mininterval == seconds
        for n in range(100):
            now[0] = float(n)
            bar.update(1)
        states = out.getvalue().count("/1000")
    assert states > 90 if terminal else states <= 5


@pytest.mark.slow
def test_control_runs_answer_otherwise(asked, world, tmp_path):
    plain = answers(asked)
    for control in ("blind", "shuffled"):
        assert evaluate.run(make_config(world, control=control), str(tmp_path / control)) == 0
        found = read_predictions(tmp_path / control)
        assert {one.control for one in found} == {control}
        # The broken clip is no obstacle to a question that is asked without it.
        assert len(found) == (13 if control == "blind" else 12)
        assert any(answers(tmp_path / control)[name][0] != plain[name][0] for name in plain)


@pytest.fixture
def processes_config(tmp_path, monkeypatch):
    """Returns a function of a config: its file, for processes that share their compiled programs."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return lambda config: write_config(tmp_path / "run_config.py", config)


@pytest.mark.slow
def test_five_kills_lose_and_repeat_nothing(world, tmp_path, processes_config):
    rows = [json.loads(line) for line in (world / "asked.jsonl").read_text().splitlines()]
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    config = make_config(world, data__path=str(many), questions_per_video=1, prompts_at_once=1, max_new_tokens=16)
    workdir, moments = tmp_path / "killed", random.Random(5)
    path, file = workdir / "predictions.jsonl", processes_config(config)

    def lines():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for _ in range(5):
        wanted = lines() + moments.randint(0, 6)
        with Processes(file, workdir) as run:
            victim, end = run.running[0], time.monotonic() + 120
            while lines() < wanted:
                assert victim.poll() is None and time.monotonic() < end, run.text()
                time.sleep(0.001)
            time.sleep(moments.random() * 0.02)
            victim.kill()
            assert victim.wait() == -9, run.text()
    assert 0 < lines() < 72
    with Processes(file, workdir) as run:
        assert run.wait() == [0], run.text()
    whole = make_config(world, data__path=str(many), max_new_tokens=16)
    assert evaluate.run(whole, str(tmp_path / "whole")) == 0
    assert len(path.read_text().splitlines()) == 72  # read_predictions refuses an id that is there twice
    assert answers(workdir) == answers(tmp_path / "whole")
    assert len((workdir / "quarantine.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_two_processes_ask_what_one_does_of_a_model_that_a_run_has_trained(asked, world, tmp_path, processes_config):
    training = sft_config.get_config("tiny")
    training.data.sample, training.model.path = "", str(world / "model")
    training.data.path, training.data.root = str(world / "world/records.json"), str(world / "world")
    training.video.num_frames, training.train.steps, training.train.batch_size = FRAMES, 2, 8
    training.optim.lr, training.optim.warmup_ratio, training.optim.schedule = 0.05, 0.0, "constant"
    assert sft.run(training, str(tmp_path / "trained")) == 0
    config = make_config(world, model__path="", model__adapter=str(tmp_path / "trained"))
    assert evaluate.run(config, str(tmp_path / "one")) == 0
    one = answers(tmp_path / "one")
    assert one.keys() == answers(asked).keys() and one != answers(asked)
    exported = {"form": "peft", "model.adapter": str(tmp_path / "trained"), "output": str(tmp_path / "peft")}
    assert export.run(common.config("export", exported), "unused") == 0
    assert evaluate.run(make_config(world, model__adapter=exported["output"]), str(tmp_path / "of_peft")) == 0
    assert answers(tmp_path / "of_peft") == one
    with Processes(processes_config(config), tmp_path / "two", count=2) as run:
        assert run.wait() == [0, 0], run.text()
    assert answers(tmp_path / "two") == one
    assert sorted(p.name for p in (tmp_path / "two").glob("predictions*")) == [
        "predictions.1.jsonl",
        "predictions.jsonl",
    ]
    # The first process has nothing left to ask, the second one lost an answer.
    path = tmp_path / "two/predictions.1.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with Processes(processes_config(config), tmp_path / "two", count=2) as run:
        assert run.wait() == [0, 0], run.text()
    assert answers(tmp_path / "two") == one
    results = json.loads((tmp_path / "two/results.json").read_text())
    assert (results["groups"][0]["n"], results["unusable"]) == (12, 1)
