"""The file of predictions: nothing lost and nothing twice, whenever its writer is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from configs import common, reading
from mllm4d_jax import __version__
from mllm4d_jax.eval.predictions import (
    Prediction,
    PredictionError,
    PredictionStore,
    config_hash,
    read_predictions,
)
from mllm4d_jax.files.jsonl import JsonLinesError
from mllm4d_jax.files.lock import LockError, WriterLock
from tests.eval.question_fixtures import item, prediction

IDS = [f"q{n}" for n in range(40)]

WRITER = """
import sys
from mllm4d_jax.eval.predictions import PredictionStore
from tests.eval.question_fixtures import prediction

with PredictionStore(sys.argv[1], "c0") as store:
    for name in sys.argv[2].split(","):
        if name not in store.done:
            store.append([prediction(name, response="left " * 5000)])
            print(name, flush=True)
"""


def test_a_prediction_knows_what_it_is(tmp_path):
    made = prediction("q1", "<answer>B</answer>", truth=("A", "B"), finish="length", control="blind")
    assert (made.letter, made.rule, made.correct, made.control, made.finish) == ("B", "letter", True, "blind", "length")
    assert not prediction("q1", "").correct and prediction("q1", "A. right").conflict
    again = Prediction.from_row(json.loads(json.dumps(made.to_row())), "here")
    assert again == made


def test_what_is_written_is_read(tmp_path):
    written = [prediction(name, response) for name, response in zip(IDS, ("A", "\u2028 ü", "\ud800"), strict=False)]
    with PredictionStore(tmp_path / "run", "c0") as store:
        assert store.done == frozenset()
        store.append(written[:1])
        store.append(written[1:])
    assert read_predictions(tmp_path / "run") == tuple(written)
    assert read_predictions(tmp_path / "run" / "predictions.jsonl") == tuple(written)
    fields = set(json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0]))
    assert fields >= {"id", "video", "choices", "truth", "response", "tokens", "finish", "letter", "control", "config"}


def test_answers_know_the_version_that_gave_them(tmp_path):
    row = prediction("q0").to_row()
    assert row["version"] == __version__
    older = {name: value for name, value in row.items() if name != "version"} | {"id": "q1"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(older) + "\n")
    with PredictionStore(tmp_path, "c0") as store:
        assert store.done == {"q0", "q1"} and store.versions == {__version__, ""}


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_cut_line_is_dropped_and_asked_again(tmp_path, cut):
    with PredictionStore(tmp_path, "c0") as store:
        store.append([prediction("q0"), prediction("q1", "ü" * 200)])
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert [one.id for one in read_predictions(path)] == ["q0"]
    with PredictionStore(tmp_path, "c0") as store:
        assert store.done == {"q0"}
        store.append([prediction("q1", "B")])
    assert [(one.id, one.response) for one in read_predictions(path)] == [("q0", "A"), ("q1", "B")]


def test_a_whole_line_without_its_line_break_is_kept(tmp_path):
    with PredictionStore(tmp_path, "c0") as store:
        store.append([prediction("q0")])
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with PredictionStore(tmp_path, "c0") as store:
        assert store.done == {"q0"}
        store.append([prediction("q1")])
    assert [one.id for one in read_predictions(path)] == ["q0", "q1"]


def test_five_kills_lose_and_repeat_nothing(tmp_path):
    seen = []
    for attempt in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path), ",".join(IDS)]
        with subprocess.Popen(command, cwd=reading.ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                seen.append(line.strip())
                if attempt < 5 and len(seen) % 7 == 0:
                    os.kill(process.pid, signal.SIGKILL)
                    break
        assert len({one.id for one in read_predictions(tmp_path)}) >= len(set(seen))
    found = [one.id for one in read_predictions(tmp_path)]
    assert sorted(found) == sorted(IDS) and len(seen) == len(set(seen))


@pytest.mark.parametrize("truth", [[["A"]], [{}], [None], ["E"], [], [1], "A", None])
def test_a_truth_that_names_no_option(truth):
    with pytest.raises(PredictionError, match="where: 'truth'"):
        Prediction.from_row(prediction().to_row() | {"truth": truth}, "where")


def test_hosts_write_files_of_their_own(tmp_path):
    for host in range(2):
        with PredictionStore(tmp_path, "c0", host=host) as store:
            store.append([prediction(name) for name in IDS[host::2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.1.jsonl", "predictions.jsonl"]
    merged = read_predictions(tmp_path)
    assert sorted(one.id for one in merged) == sorted(IDS)
    with PredictionStore(tmp_path, "c0") as store:  # the same work, now on one host: nothing is left to do
        assert store.done == set(IDS)
        with pytest.raises(PredictionError, match="'q1' is answered already"):
            store.append([prediction("q1")])


def test_an_id_in_two_files_is_refused(tmp_path):
    for host in range(2):
        with PredictionStore(tmp_path / str(host), "c0", host=host) as store:
            store.append([prediction("q0")])
    (tmp_path / "0" / "predictions.1.jsonl").write_bytes((tmp_path / "1" / "predictions.1.jsonl").read_bytes())
    with pytest.raises(PredictionError, match="'q0' is also in .*line 1"):
        read_predictions(tmp_path / "0")


def test_another_configuration_is_refused(tmp_path):
    with PredictionStore(tmp_path, "c0") as store:
        store.append([prediction("q0")])
        with pytest.raises(PredictionError, match="has the config c1, this store c0"):
            store.append([prediction("q1", config="c1")])
    with pytest.raises(PredictionError, match="made with another configuration"):
        PredictionStore(tmp_path, "c1").__enter__()
    (tmp_path / "predictions.1.jsonl").write_text(json.dumps(prediction("q9", config="c1").to_row()) + "\n")
    with pytest.raises(PredictionError, match="made with config c"):
        read_predictions(tmp_path)


def test_one_writer_at_a_time_and_all_or_nothing(tmp_path):
    with PredictionStore(tmp_path, "c0") as store:
        with pytest.raises(PredictionError, match="another run is writing"):
            PredictionStore(tmp_path, "c0").__enter__()
        with pytest.raises(LockError, match="another run is writing"):  # of whatever kind
            WriterLock.of(tmp_path).__enter__()
        with PredictionStore(tmp_path, "c0", host=1):
            pass
        with pytest.raises(PredictionError, match="answered already"):
            store.append([prediction("q0"), prediction("q0")])
        store.append([prediction("q0")])
        with pytest.raises(PredictionError, match="answered already"):
            store.append([prediction("q1"), prediction("q0")])
    assert [one.id for one in read_predictions(tmp_path)] == ["q0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": []}, "'truth' is"),
        ({"truth": ["E"]}, "'truth' is"),
        ({"truth": [["A"]]}, "'truth' is"),
        ({"truth": [None]}, "'truth' is"),
        ({"response": None}, "'response' cannot be None"),
        ({"choices": []}, "'choices' cannot be"),
        ({"tokens": "3"}, "'tokens' cannot be '3'"),
        ({"correct": 1}, "'correct' cannot be 1"),
    ],
)
def test_unusable_lines_are_named(tmp_path, change, message):
    path = tmp_path / "predictions.jsonl"
    rows = [prediction("q0").to_row(), prediction("q1").to_row() | change]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PredictionError) as caught:
        read_predictions(path)
    assert message in str(caught.value) and "line 2" in str(caught.value)


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "predictions.jsonl"
    good = json.dumps(prediction("q0").to_row())
    for text in (good[:50], "[]"):
        path.write_text(f"{text}\n{good}\n")
        with pytest.raises(JsonLinesError, match="line 1: not a JSON object.*delete it"):
            read_predictions(path)
        with pytest.raises(JsonLinesError, match="line 1: not a JSON object"), PredictionStore(tmp_path, "c0"):
            pass
    path.write_text('{"id": "q0"}\n')
    with pytest.raises(PredictionError, match="line 1: has no benchmark"):
        read_predictions(path)
    with pytest.raises(PredictionError, match="no such file"):
        read_predictions(tmp_path / "nothing")


def test_the_hash_is_that_of_what_answers_depend_on():
    def digest(content="abc", **values):
        config = common.config("eval", {name.replace("__", "."): value for name, value in values.items()})
        return config_hash(config, {"data.path": content})

    assert digest() == digest(data__path="moved", data__workers=4, mesh__data=2, workdir="b") and len(digest()) == 16
    assert len({digest(), digest(temperature=1.0), digest("xyz"), digest(video__fps=2.0)}) == 4


def test_item_fields_are_taken_over():
    made = item("q7", category="far", subtask="near", video="v", media="/v", split="s", benchmark="b")
    one = Prediction.of(made, "A", prompt_mode="file", config="c")
    assert (one.category, one.subtask, one.video, one.media, one.split) == ("far", "near", "v", "/v", "s")
    assert (one.prompt_mode, one.tokens, one.finish, one.control) == ("file", None, None, "")
